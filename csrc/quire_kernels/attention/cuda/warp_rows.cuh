// 16 rows of a warp over keys and values in shared memory: for any GPU from 8.0 on.
//
// Keys come in units of 16 tokens of one block: 16 rows of a key and its value, one piece of
// memory. In shared memory the 16-byte pieces of a row are swizzled by (row & 7).
#pragma once

#include "arguments.h"
#include "numbers.cuh"
#include "tensor_cores.cuh"

namespace quire {

constexpr int UNIT = 16;

template <int D>
constexpr int UNIT_BYTES = UNIT * 2 * D * 2;

// Start copying a unit by one warp; rows outside [from, to) become zeros, and are not read.
template <int D>
__device__ __forceinline__ void copy_unit(uint32_t to_address, const Arguments& a, int block,
                                          int kv_head, int key, int from, int to) {
    constexpr int PIECES = D / 4;
    const int lane = threadIdx.x % 32;
    const char* source =
        static_cast<const char*>(a.cache) +
        (block * a.block_stride + (kv_head * a.block_size + key % a.block_size) * int64_t(2 * D)) *
            2;
#pragma unroll
    for (int i = 0; i < UNIT * PIECES / 32; ++i) {
        const int piece = i * 32 + lane;
        const int row = piece / PIECES, column = piece % PIECES;
        const uint32_t place = to_address + row * (PIECES * 16) + ((column ^ (row & 7)) * 16);
        copy_16_bytes(place, source + piece * 16, key + row >= from && key + row < to);
    }
}

// A thread has rows lane / 4 and 8 more, and in each two columns of 8.
template <typename T, int D>
struct WarpRows {
    static constexpr int PIECES = D / 4;

    const Scale scale;
    const int lane;
    uint32_t queries[D / 16][4];
    float out[D / 8][4];
    float peak[2], total[2];
    // The keys that a row sees: [from, to].
    int from[2], to[2];

    __device__ __forceinline__ explicit WarpRows(const Arguments& a)
        : scale(a.scale, a.softcap), lane(threadIdx.x % 32) {
#pragma unroll
        for (int h = 0; h < 2; ++h) peak[h] = LOWEST, total[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
        }
    }

    // Load the queries of a row, zeros for a row that is null.
    __device__ __forceinline__ void load_queries(int h, const T* row) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(row) + (lane & 3);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            queries[i][h] = row ? words[8 * i] : 0;
            queries[i][2 + h] = row ? words[8 * i + 4] : 0;
        }
    }

    // Attend UNITS units that lie one behind the other, the first key of which is `key`.
    template <int UNITS>
    __device__ __forceinline__ void attend(uint32_t units, int key, bool is_masked) {
        float scores[2 * UNITS][4];
        multiply_keys<UNITS>(scores, units);
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
        multiply_values<UNITS>(scores, units);
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
                load_matrices(keys, own + u * UNIT_BYTES<D> + piece * 16);
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
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float* pair = weights[2 * u + j / 2] + 2 * (j % 2);
                rounded[j] = pack<T>(pair[0], pair[1]);
            }
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                uint32_t values[4];
                const uint32_t piece = (D / 8 + 2 * i + next) ^ (row & 7);
                load_transposed(values, own + u * UNIT_BYTES<D> + piece * 16);
                multiply<T>(out[2 * i], rounded, values[0], values[1]);
                multiply<T>(out[2 * i + 1], rounded, values[2], values[3]);
            }
        }
    }
};

}  // namespace quire
