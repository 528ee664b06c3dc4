// Products of up to 8 rows, alone or with the norm before and SiLU after.
//
// A block of 8 warps makes 16 outputs (of each of two parts, gated) and goes on to others. Its warps
// take turns at tiles of 64 inputs; each reads its own codes straight into registers, as the
// factors of `mma.sync`, eight tiles ahead and before the kernel before has ended:
//
//     tile of inputs   0    1    2   ...   7    8    9  ...
//     warp             0    1    2   ...   7    0    1  ...
//
// Sums of a group are scaled in float32; those of the warps are added in their order at the end.
#pragma once

#include "../../attention/cuda/tensor_cores.cuh"
#include "arguments.h"
#include "codes.cuh"

namespace quire {

constexpr int FEW_WARPS = 8;
constexpr int FEW_THREADS = 32 * FEW_WARPS;
constexpr int FEW_DEPTH = 8;
constexpr int FEW_ROWS = 8;
// Floats between the sums of two rows, so that lanes write to different banks.
constexpr int SUM_STRIDE = 20;

// Bytes of shared memory: rows of x, a row's end of zeros, sums of two tiles, and squares.
inline int few_rows_shared_bytes(int rows, int in_features, int parts) {
    const int sums = 2 * parts * FEW_WARPS * FEW_ROWS * SUM_STRIDE * 4;
    return rows * (in_features + 8) * 2 + 16 + sums + FEW_ROWS * FEW_WARPS * 4;
}

__device__ __forceinline__ uint4 load_once(const void* from) {
    uint4 found;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
                 : "l"(from));
    return found;
}

__device__ __forceinline__ uint32_t load_word(const void* from) {
    uint32_t found;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(found) : "l"(from));
    return found;
}

// What a warp reads of a tile: its codes, and in lanes 0 to 9 the scales (two a lane) and zero points
// (eight a lane) of its outputs, in lanes 16 to 25 those of a second group.
struct Fetched {
    uint4 codes;
    uint32_t group;
};

template <int GROUPS>
struct Fetcher {
    const PackedArguments& a;
    const int tiles, chunks, turns, parts, warp, lane;
    int tile, part = 0, turn = 0;

    __device__ __forceinline__ Fetched next() {
        Fetched found = {make_uint4(0, 0, 0, 0), 0};
        const int chunk = turn * FEW_WARPS + warp;
        if (chunk < chunks && tile < tiles) {
            const int place = tile + part * tiles;
            found.codes = load_once(a.tiles + (int64_t(place) * chunks + chunk) * TILE_BYTES +
                                    lane * 16);
            const int group = (chunk * TILE_IN + lane / 16 * 32) >> a.group_shift;
            const int own = lane % 16;
            if (own < 10 && lane / 16 < GROUPS) {
                const void* from =
                    own < 8 ? static_cast<const void*>(a.scales + group * a.scale_stride +
                                                       place * TILE_OUT + 2 * own)
                            : a.zeros + group * a.zero_stride + place * 8 + 4 * (own - 8);
                found.group = load_word(from);
            }
        }
        advance();
        return found;
    }

    __device__ __forceinline__ void advance() {
        if (++turn < turns) return;
        turn = 0;
        if (++part < parts) return;
        part = 0;
        tile += gridDim.x;
    }
};

// Put the rows of x into shared memory, normed or as they are; all threads meet behind it.
template <typename T>
__device__ __forceinline__ void stage_rows(const PackedArguments& a, T* rows, float* squares) {
    using N = Number<T>;
    const int vectors = a.in_features / 8, stride = a.in_features + 8;
    const T* norm = static_cast<const T*>(a.norm);
    for (int n = 0; n < a.rows; ++n) {
        const T* x = static_cast<const T*>(a.x) + n * a.x_stride;
        const T* residual = static_cast<const T*>(a.residual) + n * a.residual_stride;
        float sum = 0.0f;
        for (int v = threadIdx.x; v < vectors; v += FEW_THREADS) {
            uint4 own = *reinterpret_cast<const uint4*>(x + 8 * v);
            if (norm != nullptr) {
                const uint4 other = *reinterpret_cast<const uint4*>(residual + 8 * v);
                T* added = reinterpret_cast<T*>(&own);
                const T* addend = reinterpret_cast<const T*>(&other);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    added[i] = N::rounded(N::wide(added[i]) + N::wide(addend[i]));
                    sum += N::wide(added[i]) * N::wide(added[i]);
                }
                if (blockIdx.x == 0) {
                    T* total = static_cast<T*>(a.total) + int64_t(n) * a.in_features;
                    *reinterpret_cast<uint4*>(total + 8 * v) = own;
                }
            }
            *reinterpret_cast<uint4*>(rows + n * stride + 8 * v) = own;
        }
        if (norm == nullptr) continue;
#pragma unroll
        for (int apart = 16; apart; apart /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, apart);
        if (threadIdx.x % 32 == 0) squares[n * FEW_WARPS + threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (norm == nullptr) return;
    for (int n = 0; n < a.rows; ++n) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < FEW_WARPS; ++w) sum += squares[n * FEW_WARPS + w];
        const float scale = rsqrtf(sum / a.in_features + a.eps);
        for (int v = threadIdx.x; v < vectors; v += FEW_THREADS) {
            T* own = rows + n * stride + 8 * v;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float normed = N::wide(N::rounded(N::wide(own[i]) * scale));
                own[i] = N::rounded(normed * N::wide(norm[8 * v + i]));
            }
        }
    }
    __syncthreads();
}

// sums += the tile's weights * 64 inputs of all rows. `first` and `second` are where this lane's rows
// of the inputs' matrices lie, of the first 32 and the other 32.
template <typename T, int GROUPS>
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const Fetched& fetched, int lane,
                                              uint32_t first, uint32_t second) {
    uint32_t x[2][4];
    load_matrices(x[0], first);
    load_matrices(x[1], second);
    const uint32_t words[4] = {fetched.codes.x, fetched.codes.y, fetched.codes.z, fetched.codes.w};
    const int row = lane / 4;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        float scales[2];
        uint32_t offsets[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t two =
                __shfl_sync(0xFFFFFFFF, fetched.group, 16 * group + 4 * h + row / 2);
            const uint32_t eight = __shfl_sync(0xFFFFFFFF, fetched.group, 16 * group + 8 + h);
            scales[h] = __half2float(bits_as<__half>(static_cast<uint16_t>(two >> row % 2 * 16)));
            offsets[h] = offset_of<T>(eight >> 4 * row & 15);
        }
        float part[4] = {};
#pragma unroll
        for (int step = group * 4 / GROUPS; step < (group + 1) * 4 / GROUPS; ++step) {
            uint32_t weights[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                weights[i] = bits_as<uint32_t>(code_pair<T>(words[step], i, offsets[i % 2]));
            }
            multiply<T>(part, weights, x[step / 2][step % 2 * 2], x[step / 2][step % 2 * 2 + 1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += scales[i / 2] * part[i];
    }
}

// Add the warps' sums of one output and row, and write it.
template <typename T, int PARTS>
__device__ __forceinline__ void finish_tile(const PackedArguments& a, const float* sums, int tile) {
    using N = Number<T>;
    const int n = threadIdx.x / TILE_OUT, place = threadIdx.x % TILE_OUT;
    if (n >= a.rows) return;
    float found[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        found[part] = 0.0f;
#pragma unroll
        for (int w = 0; w < FEW_WARPS; ++w) {
            found[part] += sums[((part * FEW_WARPS + w) * FEW_ROWS + n) * SUM_STRIDE + place];
        }
    }
    const int output = tile * TILE_OUT + place;
    if (a.bias != nullptr) found[0] += N::wide(static_cast<const T*>(a.bias)[output]);
    T result = N::rounded(found[0]);
    if (PARTS == 2) {
        const float gate = N::wide(result);
        const float opened = N::wide(N::rounded(gate / (1.0f + __expf(-gate))));
        result = N::rounded(opened * N::wide(N::rounded(found[PARTS - 1])));
    }
    static_cast<T*>(a.out)[n * a.out_stride + output] = result;
}

// GROUPS: how many groups of inputs a tile crosses.
template <typename T, int GROUPS, int PARTS>
__global__ void __launch_bounds__(FEW_THREADS, 2) few_rows(const PackedArguments a) {
    extern __shared__ __align__(16) uint8_t shared[];
    let_next_begin();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tiles = a.num_out / TILE_OUT / PARTS, chunks = a.in_features / TILE_IN;
    const int turns = (chunks + FEW_WARPS * FEW_DEPTH - 1) / (FEW_WARPS * FEW_DEPTH) * FEW_DEPTH;
    Fetcher<GROUPS> fetcher{a, tiles, chunks, turns, PARTS, warp, lane, int(blockIdx.x)};
    Fetched fetched[FEW_DEPTH];
#pragma unroll
    for (int d = 0; d < FEW_DEPTH; ++d) fetched[d] = fetcher.next();

    const int stride = a.in_features + 8;
    T* rows = reinterpret_cast<T*>(shared);
    uint4* nothing = reinterpret_cast<uint4*>(rows + a.rows * stride);
    float* all_sums = reinterpret_cast<float*>(nothing + 1);
    constexpr int SUMS = PARTS * FEW_WARPS * FEW_ROWS * SUM_STRIDE;
    if (threadIdx.x == 0) *nothing = make_uint4(0, 0, 0, 0);
    wait_for_previous();
    stage_rows<T>(a, rows, all_sums + 2 * SUMS);

    const int n = lane % 8;
    const bool is_row = n < a.rows;
    const T* own = is_row ? rows + n * stride + lane / 8 * 8 : reinterpret_cast<T*>(nothing);
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(own));
    // Who writes into a half again has met all others behind the tile between.
    int half = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, half ^= 1) {
        float* sums = all_sums + half * SUMS;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            float found[4] = {};
            for (int turn = 0; turn < turns; turn += FEW_DEPTH) {
#pragma unroll
                for (int d = 0; d < FEW_DEPTH; ++d) {
                    const int chunk = (turn + d) * FEW_WARPS + warp;
                    if (chunk < chunks) {
                        const uint32_t first = from + (is_row ? chunk * TILE_IN * 2 : 0);
                        multiply_tile<T, GROUPS>(found, fetched[d], lane, first,
                                                 first + (is_row ? 64 : 0));
                    }
                    fetched[d] = fetcher.next();
                }
            }
            float* place = sums + (part * FEW_WARPS + warp) * FEW_ROWS * SUM_STRIDE + lane / 4;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                place[(2 * (lane % 4) + i % 2) * SUM_STRIDE + i / 2 * 8] = found[i];
            }
        }
        __syncthreads();
        finish_tile<T, PARTS>(a, sums, tile);
    }
}

}  // namespace quire
