// Products of up to 8 rows, alone or with the norm before and SiLU after.
//
// A block of 8 warps makes 16 outputs (of each of two parts, gated) and goes on to others. Its warps
// take turns at tiles of 64 inputs; each has its own copied, seven tiles ahead and before the kernel
// before has ended:
//
//     tile of inputs   0    1    2   ...   7    8    9  ...
//     warp             0    1    2   ...   7    0    1  ...
//
// Sums of a group are scaled in float32; those of the warps are added in their order at the end.
#pragma once

#include "ring.cuh"

namespace quire {

constexpr int FEW_WARPS = 8;
constexpr int FEW_THREADS = 32 * FEW_WARPS;
constexpr int FEW_DEPTH = 8;
constexpr int FEW_ROWS = 8;
// Blocks an SM, where rows leave room for them.
constexpr int FEW_BLOCKS = 3;
// Floats between the sums of two rows, so that lanes write to different banks.
constexpr int SUM_STRIDE = 20;

// Bytes of shared memory: rows of x, a row's end of zeros, sums of two tiles, squares, and rings.
template <int GROUPS, int PARTS>
int few_rows_shared_bytes(int rows, int in_features) {
    const int sums = 2 * PARTS * FEW_WARPS * rows * SUM_STRIDE * 4;
    const int rings = FEW_WARPS * TileRing<GROUPS, FEW_DEPTH>::BYTES;
    return rows * (in_features + 8) * 2 + 16 + sums + FEW_ROWS * FEW_WARPS * 4 + rings;
}

// Which tile of its outputs and inputs a warp fetches next.
template <int PARTS>
struct FewTurns {
    const PackedArguments& a;
    const int tiles, chunks, warp;
    int tile, part = 0, chunk;

    template <typename Ring>
    __device__ __forceinline__ void begin(Ring& ring) {
        chunk = warp;
        if (tile < tiles) ring.go_to(a, tile + part * tiles);
    }

    // Each warp has as many turns as those with the most, of which it skips what it has not.
    template <typename Ring>
    __device__ __forceinline__ void fetch(Ring& ring) {
        const bool is_wanted = chunk < chunks && tile < tiles;
        ring.fetch(is_wanted ? chunk : 0, is_wanted);
        chunk += FEW_WARPS;
        if (chunk - warp < chunks) return;
        if (++part == PARTS) part = 0, tile += gridDim.x;
        begin(ring);
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

// sums += the weights of the ring's oldest tile * 64 inputs of all rows. `first` and `second` are where
// this lane's rows of the inputs' matrices lie, of the first 32 and the other 32.
template <typename T, int GROUPS>
__device__ __forceinline__ void multiply_tile(float (&sums)[4],
                                              const TileRing<GROUPS, FEW_DEPTH>& ring,
                                              uint32_t first, uint32_t second) {
    uint32_t x[2][4];
    load_matrices(x[0], first);
    load_matrices(x[1], second);
    const uint4 codes = ring.codes();
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        const float scales[2] = {__half2float(ring.scale(group, 0)),
                                 __half2float(ring.scale(group, 1))};
        const uint32_t offsets[2] = {ring.template offset<T>(group, 0),
                                     ring.template offset<T>(group, 1)};
        // Two chains, for a product waits for the one before.
        float part[2][4] = {};
#pragma unroll
        for (int step = group * 4 / GROUPS; step < (group + 1) * 4 / GROUPS; ++step) {
            uint32_t weights[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                weights[i] = bits_as<uint32_t>(code_pair<T>(words[step], i, offsets[i % 2]));
            }
            multiply<T>(part[step % 2], weights, x[step / 2][step % 2 * 2],
                        x[step / 2][step % 2 * 2 + 1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += scales[i / 2] * (part[0][i] + part[1][i]);
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
            found[part] += sums[((part * FEW_WARPS + w) * a.rows + n) * SUM_STRIDE + place];
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
__global__ void __launch_bounds__(FEW_THREADS, FEW_BLOCKS) few_rows(const PackedArguments a) {
    extern __shared__ __align__(16) uint8_t shared[];
    let_next_begin();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tiles = a.num_out / TILE_OUT / PARTS, chunks = a.in_features / TILE_IN;
    const int turns = (chunks + FEW_WARPS - 1) / FEW_WARPS;
    const int stride = a.in_features + 8;
    T* rows = reinterpret_cast<T*>(shared);
    uint4* nothing = reinterpret_cast<uint4*>(rows + a.rows * stride);
    float* all_sums = reinterpret_cast<float*>(nothing + 1);
    const int half_size = PARTS * FEW_WARPS * a.rows * SUM_STRIDE;
    float* squares = all_sums + 2 * half_size;
    uint8_t* rings = reinterpret_cast<uint8_t*>(squares + FEW_ROWS * FEW_WARPS);
    using Ring = TileRing<GROUPS, FEW_DEPTH>;
    Ring ring(a, rings + warp * Ring::BYTES, lane);
    FewTurns<PARTS> next{a, tiles, chunks, warp, int(blockIdx.x)};
    next.begin(ring);
    for (int i = 0; i < FEW_DEPTH - 1; ++i) next.fetch(ring);
    if (threadIdx.x == 0) *nothing = make_uint4(0, 0, 0, 0);
    wait_for_previous();
    stage_rows<T>(a, rows, squares);

    const int n = lane % 8;
    const bool is_row = n < a.rows;
    const T* own = is_row ? rows + n * stride + lane / 8 * 8 : reinterpret_cast<T*>(nothing);
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(own));
    // Who writes into a half again has met all others behind the tile between.
    int half = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, half ^= 1) {
        float* sums = all_sums + half * half_size;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            float found[4] = {};
#pragma unroll 2
            for (int turn = 0; turn < turns; ++turn) {
                ring.wait();
                next.fetch(ring);
                const int chunk = turn * FEW_WARPS + warp;
                if (chunk < chunks) {
                    const uint32_t first = from + (is_row ? chunk * TILE_IN * 2 : 0);
                    multiply_tile<T, GROUPS>(found, ring, first, first + (is_row ? 64 : 0));
                }
                ring.advance();
            }
            float* place = sums + (part * FEW_WARPS + warp) * a.rows * SUM_STRIDE + lane / 4;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = 2 * (lane % 4) + i % 2;
                if (row < a.rows) place[row * SUM_STRIDE + i / 2 * 8] = found[i];
            }
        }
        __syncthreads();
        finish_tile<T, PARTS>(a, sums, tile);
    }
}

}  // namespace quire
