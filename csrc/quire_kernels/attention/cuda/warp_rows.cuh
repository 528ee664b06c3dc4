// 16 rows of a warp over keys and values in shared memory: for any GPU from 8.0 on.
//
// Keys come in units of 16 tokens of one block: 16 rows of a key and its value, one piece of
// memory. In shared memory the 16-byte pieces of a row are swizzled by (row & 7).
//
// Floats of 8 bits are made float16, which holds them all, and multiplied as such. A word has four
// of them where the products want two, so that dimensions change places, which sums over them do
// not see: in a group of 16, thread i of a row's four has dimensions 4 * i to 4 * i + 3 of queries,
// keys and sums alike.
#pragma once

#include "arguments.h"
#include "numbers.cuh"
#include "tensor_cores.cuh"

namespace quire {

constexpr int UNIT = 16;

// What a cache holds: numbers T of the model, or floats of 8 bits. `Product` are multiplied.
template <typename T>
struct Wide {
    using Product = T;
    static constexpr int BYTES = 2;
    static constexpr bool IS_QUANTIZED = false;
};

template <__nv_fp8_interpretation_t FORMAT>
struct Quantized {
    using Product = __half;
    static constexpr int BYTES = 1;
    static constexpr bool IS_QUANTIZED = true;
    static constexpr __nv_fp8_interpretation_t KIND = FORMAT;
};

using E4M3 = Quantized<__NV_E4M3>;
using E5M2 = Quantized<__NV_E5M2>;

// 16-byte pieces of a key and its value, and bytes of a unit.
template <typename C, int D>
constexpr int ROW_PIECES = 2 * D * C::BYTES / 16;
template <typename C, int D>
constexpr int UNIT_BYTES = UNIT * ROW_PIECES<C, D> * 16;

// Start copying a unit by one warp; rows outside [from, to) become zeros, and are not read.
template <typename C, int D>
__device__ __forceinline__ void copy_unit(uint32_t to_address, const Arguments& a, int block,
                                          int kv_head, int key, int from, int to) {
    constexpr int PIECES = ROW_PIECES<C, D>;
    static_assert(PIECES % 8 == 0, "the swizzle leaves the row");
    const int lane = threadIdx.x % 32;
    const char* source =
        static_cast<const char*>(a.cache) +
        (block * a.block_stride + (kv_head * a.block_size + key % a.block_size) * int64_t(2 * D)) *
            C::BYTES;
#pragma unroll
    for (int i = 0; i < UNIT * PIECES / 32; ++i) {
        const int piece = i * 32 + lane;
        const int row = piece / PIECES, column = piece % PIECES;
        const uint32_t place = to_address + row * (PIECES * 16) + ((column ^ (row & 7)) * 16);
        copy_16_bytes(place, source + piece * 16, key + row >= from && key + row < to);
    }
}

// A thread has rows lane / 4 and 8 more, and in each two columns of 8.
template <typename T, typename C, int D>
struct WarpRows {
    using Product = typename C::Product;
    static constexpr int PIECES = ROW_PIECES<C, D>;

    const Scale scale;
    const int lane;
    uint32_t queries[D / 16][4];
    float out[D / 8][4];
    float peak[2], total[2];
    // The keys that a row sees: [from, to].
    int from[2], to[2];
    // What the products of a row with keys are multiplied by, where its queries were made smaller.
    float enlarge[2];

    __device__ __forceinline__ WarpRows(const Arguments& a, int kv_head)
        : scale(C::IS_QUANTIZED ? a.scale * a.k_scale[kv_head] : a.scale, a.softcap),
          lane(threadIdx.x % 32) {
#pragma unroll
        for (int h = 0; h < 2; ++h) peak[h] = LOWEST, total[h] = 0.0f, enlarge[h] = 1.0f;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
        }
    }

    // Load the queries of a row, zeros for a row that is null.
    __device__ __forceinline__ void load_queries(int h, const T* row) {
        if constexpr (C::IS_QUANTIZED) {
            load_queries_as_halves(h, row);
            return;
        }
        const uint32_t* words = reinterpret_cast<const uint32_t*>(row) + (lane & 3);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            queries[i][h] = row ? words[8 * i] : 0;
            queries[i][2 + h] = row ? words[8 * i + 4] : 0;
        }
    }

    // As float16, made so large by a power of two that what is lost of small numbers is no more
    // than bfloat16 has lost of the largest.
    __device__ __forceinline__ void load_queries_as_halves(int h, const T* row) {
        constexpr int LARGEST_EXPONENT = 10, LEAST_EXPONENT = -100;
        const uint2* words = reinterpret_cast<const uint2*>(row) + (lane & 3);
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            const uint2 four = row ? words[4 * i] : make_uint2(0, 0);
            const float2 low = unpack<T>(four.x), high = unpack<T>(four.y);
            most = fmaxf(most, fmaxf(fabsf(low.x), fabsf(low.y)));
            most = fmaxf(most, fmaxf(fabsf(high.x), fabsf(high.y)));
        }
        most = largest_of_quad(most);
        const int found = static_cast<int>(__float_as_uint(most) >> 23) - 127;
        const int shift = LARGEST_EXPONENT - max(found, LEAST_EXPONENT);
        const float shrink = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
        enlarge[h] = __uint_as_float(static_cast<uint32_t>(127 - shift) << 23);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            const uint2 four = row ? words[4 * i] : make_uint2(0, 0);
            const float2 low = unpack<T>(four.x), high = unpack<T>(four.y);
            queries[i][h] = pack<__half>(low.x * shrink, low.y * shrink);
            queries[i][2 + h] = pack<__half>(high.x * shrink, high.y * shrink);
        }
    }

    // Attend UNITS units that lie one behind the other, the first key of which is `key`.
    template <int UNITS>
    __device__ __forceinline__ void attend(uint32_t units, int key, bool is_masked) {
        float scores[2 * UNITS][4];
        if constexpr (C::IS_QUANTIZED) {
            multiply_quantized_keys<UNITS>(scores, units);
        } else {
            multiply_keys<UNITS>(scores, units);
        }
        if (scale.capped) {
#pragma unroll
            for (int i = 0; i < 2 * UNITS; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    scores[i][j] = hyperbolic_tangent(scores[i][j] * scale.inner);
                }
            }
        }
        if (is_masked) hide<UNITS>(scores, key);
        weigh<UNITS>(scores);
        if constexpr (C::IS_QUANTIZED) {
            multiply_quantized_values<UNITS>(scores, units);
        } else {
            multiply_values<UNITS>(scores, units);
        }
    }

    template <int UNITS>
    __device__ __forceinline__ void multiply_quantized_keys(float (&scores)[2 * UNITS][4],
                                                            uint32_t units) {
        const int row = (lane & 7) + (lane >> 4) * 8, half = lane >> 3 & 1;
        const uint32_t own = units + row * (PIECES * 16);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[2 * u][j] = scores[2 * u + 1][j] = 0.0f;
#pragma unroll
            for (int i = 0; i < D / 32; ++i) {
                // Of 8 keys dimensions 32 * i on, and 16 behind; then of the next 8 keys.
                uint32_t words[4];
                const uint32_t piece = (2 * i + half) ^ (row & 7);
                load_matrices(words, own + u * UNIT_BYTES<C, D> + piece * 16);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const uint2 keys = widened<C::KIND>(words[j]);
                    multiply<__half>(scores[2 * u + j / 2], queries[2 * i + j % 2], keys.x, keys.y);
                }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                scores[2 * u][j] *= enlarge[j / 2];
                scores[2 * u + 1][j] *= enlarge[j / 2];
            }
        }
    }

    template <int UNITS>
    __device__ __forceinline__ void multiply_quantized_values(const float (&weights)[2 * UNITS][4],
                                                              uint32_t units) {
        const int row = (lane & 7) + (lane >> 3 & 1) * 8, next = lane >> 4;
        const uint32_t own = units + row * (PIECES * 16);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            uint32_t rounded[4];
            round_weights(rounded, weights, u);
#pragma unroll
            for (int i = 0; i < D / 32; ++i) {
                // Of two keys two dimensions each: 8 keys, the next 8, then 16 dimensions behind.
                uint32_t words[4];
                const uint32_t piece = (D / 16 + 2 * i + next) ^ (row & 7);
                load_transposed(words, own + u * UNIT_BYTES<C, D> + piece * 16);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    // The first dimensions of both keys, then the second ones.
                    const uint2 low = widened<C::KIND>(__byte_perm(words[2 * j], 0, 0x3120));
                    const uint2 high = widened<C::KIND>(__byte_perm(words[2 * j + 1], 0, 0x3120));
                    multiply<__half>(out[4 * i + 2 * j], rounded, low.x, high.x);
                    multiply<__half>(out[4 * i + 2 * j + 1], rounded, low.y, high.y);
                }
            }
        }
    }

    // The sums of a thread in row h for dimensions 16 * i + 4 * (lane & 3) on, of quantized values.
    __device__ __forceinline__ float4 four_sums(int i, int h) const {
        return make_float4(out[2 * i][2 * h], out[2 * i + 1][2 * h], out[2 * i][2 * h + 1],
                           out[2 * i + 1][2 * h + 1]);
    }

    template <int WEIGHTS>
    __device__ __forceinline__ void round_weights(uint32_t (&rounded)[4],
                                                  const float (&weights)[WEIGHTS][4], int u) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float* pair = weights[2 * u + j / 2] + 2 * (j % 2);
            rounded[j] = pack<Product>(pair[0], pair[1]);
        }
    }

    template <int UNITS>
    __device__ __forceinline__ void multiply_keys(float (&scores)[2 * UNITS][4], uint32_t units) {
        const int row = (lane & 7) + (lane >> 4) * 8, half = lane >> 3 & 1;
        const uint32_t own = units + row * (PIECES * 16);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[2 * u][j] = scores[2 * u + 1][j] = 0.0f;
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                uint32_t keys[4];
                const uint32_t piece = (2 * i + half) ^ (row & 7);
                load_matrices(keys, own + u * UNIT_BYTES<C, D> + piece * 16);
                multiply<T>(scores[2 * u], queries[i], keys[0], keys[1]);
                multiply<T>(scores[2 * u + 1], queries[i], keys[2], keys[3]);
            }
        }
    }

    template <int UNITS>
    __device__ __forceinline__ void hide(float (&scores)[2 * UNITS][4], int key) {
#pragma unroll
        for (int i = 0; i < 2 * UNITS; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int own = key + 8 * i + 2 * (lane & 3) + j % 2;
                const bool is_seen = own >= from[j / 2] && own <= to[j / 2];
                scores[i][j] = is_seen ? scores[i][j] : -INFINITY;
            }
        }
    }

    template <int UNITS>
    __device__ __forceinline__ void weigh(float (&scores)[2 * UNITS][4]) {
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float most = peak[h];
#pragma unroll
            for (int i = 0; i < 2 * UNITS; ++i) {
                most = fmaxf(most, fmaxf(scores[i][2 * h], scores[i][2 * h + 1]));
            }
            most = largest_of_quad(most);
            shrink[h] = power_of_two((peak[h] - most) * scale.factor);
            peak[h] = most;
            const float base = most * scale.factor;
            total[h] *= shrink[h];
#pragma unroll
            for (int i = 0; i < 2 * UNITS; ++i) {
#pragma unroll
                for (int j = 2 * h; j < 2 * h + 2; ++j) {
                    scores[i][j] = power_of_two(fmaf(scores[i][j], scale.factor, -base));
                    total[h] += scores[i][j];
                }
            }
        }
        // Peaks rarely move once a row has seen many keys.
        if (__any_sync(0xFFFFFFFF, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < D / 8; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) out[i][j] *= shrink[j / 2];
            }
        }
    }

    template <int UNITS>
    __device__ __forceinline__ void multiply_values(const float (&weights)[2 * UNITS][4],
                                                    uint32_t units) {
        const int row = (lane & 7) + (lane >> 3 & 1) * 8, next = lane >> 4;
        const uint32_t own = units + row * (PIECES * 16);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            uint32_t rounded[4];
            round_weights(rounded, weights, u);
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                uint32_t values[4];
                const uint32_t piece = (D / 8 + 2 * i + next) ^ (row & 7);
                load_transposed(values, own + u * UNIT_BYTES<C, D> + piece * 16);
                multiply<T>(out[2 * i], rounded, values[0], values[1]);
                multiply<T>(out[2 * i + 1], rounded, values[2], values[3]);
            }
        }
    }
};

}  // namespace quire
