// Products of up to 8 rows, alone or with the norm before and SiLU after.
//
// A block of 16 warps makes tiles of 16 outputs (of each of two parts, gated). Its warps take turns at
// steps of 128 inputs, and each has its own next four copied, the first of them before the kernel
// before has ended:
//
//     step of inputs   0    1    2   ...   15   16   17  ...
//     warp             0    1    2   ...   15    0    1  ...
//
// Sums of a group are scaled in float32; those of the warps lie in shared memory for all of the
// block's tiles, and are added in their order at the end.
//
// Copies complete in their order, which loads into registers do not: there, waiting for the oldest of
// four steps was waiting for nearly all, and one row through 4096 -> 57344 took 25 us on an H200.
#pragma once

#include "../../attention/cuda/tensor_cores.cuh"
#include "arguments.h"
#include "codes.cuh"

namespace quire {

constexpr int FEW_WARPS = 16;
constexpr int FEW_THREADS = 32 * FEW_WARPS;
constexpr int FEW_ROWS = 8;
constexpr int FEW_DEPTH = 5;
constexpr int STEP_IN = 2 * TILE_IN;
// Floats between the sums of two rows, so that lanes write to different banks.
constexpr int SUM_STRIDE = 20;

__host__ __device__ constexpr int steps_of(int in_features) {
    return (in_features + STEP_IN - 1) / STEP_IN;
}

// Elements between two rows of x in shared memory: whole steps, and banks that differ.
__host__ __device__ constexpr int row_stride(int in_features) {
    return steps_of(in_features) * STEP_IN + 8;
}

// A step in shared memory: two tiles of codes, and of each of GROUPS groups the scales of 16 outputs,
// their zero points and 8 bytes of nothing.
constexpr int GROUP_BYTES = 48;
__host__ __device__ constexpr int step_bytes(int groups) { return 2 * TILE_BYTES + groups * GROUP_BYTES; }

// Bytes of shared memory: steps on their way, rows, squares; and the sums of a tile.
constexpr int few_rows_bytes(int rows, int in_features, int groups) {
    const int rings = FEW_WARPS * FEW_DEPTH * step_bytes(groups);
    return rings + rows * row_stride(in_features) * 2 + 16 + FEW_ROWS * FEW_WARPS * 4;
}

constexpr int tile_sum_bytes(int rows, int parts) {
    return parts * FEW_WARPS * rows * SUM_STRIDE * 4;
}

// The steps of a warp, on their way to a ring of its own. At most FEW_DEPTH - 1 are.
template <int GROUPS, int PARTS>
struct Steps {
    static constexpr int BYTES = step_bytes(GROUPS);
    const PackedArguments& a;
    const int tiles, steps, warp, lane;
    const uint32_t begin;
    uint32_t head, tail;
    // Which is fetched next, and where the tile's codes and what this lane copies of groups begin.
    int tile, part = 0, step;
    const uint8_t *codes_at, *group_at;
    int group_stride;

    __device__ __forceinline__ Steps(const PackedArguments& a, void* rings, int tiles)
        : a(a),
          tiles(tiles),
          steps(steps_of(a.in_features)),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          begin(static_cast<uint32_t>(__cvta_generic_to_shared(rings)) +
                warp * FEW_DEPTH * BYTES),
          head(begin),
          tail(begin),
          tile(blockIdx.x) {
        go_to_tile();
    }

    // Lanes 0 to 7 copy two scales each, 8 and 9 eight zero points; 16 to 25 those of another group.
    __device__ __forceinline__ void go_to_tile() {
        const int place = tile + part * tiles, own = lane % 16;
        step = warp;
        codes_at = a.tiles + int64_t(place) * (a.in_features / TILE_IN) * TILE_BYTES +
                   warp * 2 * TILE_BYTES + lane * 16;
        group_at = own < 8 ? reinterpret_cast<const uint8_t*>(a.scales) + place * 32 + 4 * own
                           : a.zeros + place * 8 + 4 * (own - 8);
        group_stride = static_cast<int>(own < 8 ? a.scale_stride * 2 : a.zero_stride);
    }

    __device__ __forceinline__ uint32_t behind(uint32_t slot) const {
        return slot + BYTES == begin + FEW_DEPTH * BYTES ? begin : slot + BYTES;
    }

    // Ask for the next step; behind the last for nothing.
    __device__ __forceinline__ void fetch() {
        if (tile < tiles && step < steps) {
            const bool has_second = (step + 1) * STEP_IN <= a.in_features;
            copy_16_bytes(tail + lane * 16, codes_at, true);
            copy_16_bytes(tail + TILE_BYTES + lane * 16, codes_at + (has_second ? TILE_BYTES : 0),
                          has_second);
            fetch_groups();
            codes_at += FEW_WARPS * 2 * TILE_BYTES;
            step += FEW_WARPS;
            if (step >= steps) {
                if (++part == PARTS) part = 0, tile += gridDim.x;
                go_to_tile();
            }
        }
        copies_commit();
        tail = behind(tail);
    }

    __device__ __forceinline__ void fetch_groups() {
#pragma unroll
        for (int first = 0; first < GROUPS; first += 2) {
            const int i = first + lane / 16;
            // Behind the last input there is no group, and nothing to scale.
            const int input = min(step * STEP_IN + i * (STEP_IN / GROUPS), a.in_features - 1);
            const uint8_t* four = group_at + int64_t(input >> a.group_shift) * group_stride;
            asm volatile(
                "{\n.reg .pred copies;\nsetp.ne.s32 copies, %2, 0;\n"
                "@copies cp.async.ca.shared.global [%0], [%1], 4;\n}\n" ::"r"(
                    tail + 2 * TILE_BYTES + i * GROUP_BYTES + 4 * (lane % 16)),
                "l"(four), "r"(int(lane % 16 < 10 && i < GROUPS))
                : "memory");
        }
    }

    // Wait for the oldest step. The slot of the one before it is free then.
    __device__ __forceinline__ void wait() const {
        copies_wait<FEW_DEPTH - 2>();
        __syncwarp();
    }

    __device__ __forceinline__ void advance() { head = behind(head); }

    // This lane's codes of 64 inputs of the oldest step: a word for each 16.
    __device__ __forceinline__ uint4 codes(int half) const {
        uint4 found;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
                     : "r"(head + half * TILE_BYTES + lane * 16)
                     : "memory");
        return found;
    }

    // The scale of output lane / 4 + 8 * h.
    __device__ __forceinline__ float scale(int group, int h) const {
        uint16_t found;
        asm volatile("ld.shared.u16 %0, [%1];"
                     : "=h"(found)
                     : "r"(of_group(group) + lane / 4 * 2 + 16 * h)
                     : "memory");
        return __half2float(bits_as<__half>(found));
    }

    template <typename T>
    __device__ __forceinline__ uint32_t offset(int group, int h) const {
        uint32_t eight;
        asm volatile("ld.shared.u32 %0, [%1];"
                     : "=r"(eight)
                     : "r"(of_group(group) + 32 + 4 * h)
                     : "memory");
        return offset_of<T>(eight >> (lane & 28) & 15);
    }

    __device__ __forceinline__ uint32_t of_group(int group) const {
        return head + 2 * TILE_BYTES + group * GROUP_BYTES;
    }
};

// Put the rows of x into shared memory, normed or as they are, and zeros behind them; all threads meet
// behind it.
template <typename T>
__device__ __forceinline__ void stage_rows(const PackedArguments& a, T* rows, float* squares) {
    using N = Number<T>;
    const int vectors = a.in_features / 8, stride = row_stride(a.in_features);
    const T* norm = static_cast<const T*>(a.norm);
    for (int n = 0; n < a.rows; ++n) {
        const T* x = static_cast<const T*>(a.x) + n * a.x_stride;
        const T* residual = static_cast<const T*>(a.residual) + n * a.residual_stride;
        float sum = 0.0f;
        for (int v = threadIdx.x; v < stride / 8; v += FEW_THREADS) {
            uint4 own = make_uint4(0, 0, 0, 0);
            if (v < vectors) own = *reinterpret_cast<const uint4*>(x + 8 * v);
            if (norm != nullptr && v < vectors) {
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
            uint4* place = reinterpret_cast<uint4*>(rows + n * stride + 8 * v);
            uint4 own = *place;
            const uint4 weights = *reinterpret_cast<const uint4*>(norm + 8 * v);
            T* values = reinterpret_cast<T*>(&own);
            const T* factors = reinterpret_cast<const T*>(&weights);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float normed = N::wide(N::rounded(N::wide(values[i]) * scale));
                values[i] = N::rounded(normed * N::wide(factors[i]));
            }
            *place = own;
        }
    }
    __syncthreads();
}

// sums += the weights of the oldest step * 128 inputs of all rows. `at` is where this lane's row of
// the first inputs' matrices lies, and `apart` how far those of 32 inputs are from each other.
template <typename T, int GROUPS, int PARTS>
__device__ __forceinline__ void multiply_step(float (&sums)[4], const Steps<GROUPS, PARTS>& from,
                                              uint32_t at, uint32_t apart) {
    const uint4 halves[2] = {from.codes(0), from.codes(1)};
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        const float scales[2] = {from.scale(group, 0), from.scale(group, 1)};
        const uint32_t offsets[2] = {from.template offset<T>(group, 0),
                                     from.template offset<T>(group, 1)};
        // Two chains, for a product waits for the one before.
        float part[2][4] = {};
#pragma unroll
        for (int pair = group * 4 / GROUPS; pair < (group + 1) * 4 / GROUPS; ++pair) {
            const uint4& codes = halves[pair / 2];
            const uint32_t words[2] = {pair % 2 ? codes.z : codes.x, pair % 2 ? codes.w : codes.y};
            uint32_t x[4];
            load_matrices(x, at + pair * apart);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                uint32_t weights[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    weights[i] = bits_as<uint32_t>(code_pair<T>(words[k], i, offsets[i % 2]));
                }
                multiply<T>(part[k], weights, x[2 * k], x[2 * k + 1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += scales[i / 2] * (part[0][i] + part[1][i]);
    }
}

// Add the warps' sums of each output and row, and write them.
template <typename T, int PARTS>
__device__ __forceinline__ void finish(const PackedArguments& a, const float* sums, int tiles) {
    using N = Number<T>;
    const int own_tiles = (tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    for (int i = threadIdx.x; i < own_tiles * a.rows * TILE_OUT; i += FEW_THREADS) {
        const int place = i % TILE_OUT, n = i / TILE_OUT % a.rows, k = i / TILE_OUT / a.rows;
        float found[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const float* own = sums + (k * PARTS + part) * FEW_WARPS * a.rows * SUM_STRIDE;
            found[part] = 0.0f;
#pragma unroll
            for (int w = 0; w < FEW_WARPS; ++w) {
                found[part] += own[(w * a.rows + n) * SUM_STRIDE + place];
            }
        }
        const int output = (blockIdx.x + k * gridDim.x) * TILE_OUT + place;
        if (a.bias != nullptr) found[0] += N::wide(static_cast<const T*>(a.bias)[output]);
        T result = N::rounded(found[0]);
        if (PARTS == 2) {
            const float gate = N::wide(result);
            const float opened = N::wide(N::rounded(gate / (1.0f + __expf(-gate))));
            result = N::rounded(opened * N::wide(N::rounded(found[PARTS - 1])));
        }
        static_cast<T*>(a.out)[n * a.out_stride + output] = result;
    }
}

// GROUPS: how many groups a step of inputs crosses.
template <typename T, int GROUPS, int PARTS>
__global__ void __launch_bounds__(FEW_THREADS, 1) few_rows(const PackedArguments a) {
    extern __shared__ __align__(16) uint8_t shared[];
    let_next_begin();
    const int tiles = a.num_out / TILE_OUT / PARTS, stride = row_stride(a.in_features);
    T* rows = reinterpret_cast<T*>(shared + FEW_WARPS * FEW_DEPTH * step_bytes(GROUPS));
    uint4* nothing = reinterpret_cast<uint4*>(rows + a.rows * stride);
    float* squares = reinterpret_cast<float*>(nothing + 1);
    float* sums = squares + FEW_ROWS * FEW_WARPS;
    Steps<GROUPS, PARTS> steps(a, shared, tiles);
    for (int i = 0; i < FEW_DEPTH - 1; ++i) steps.fetch();
    if (threadIdx.x == 0) *nothing = make_uint4(0, 0, 0, 0);
    wait_for_previous();
    stage_rows<T>(a, rows, squares);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = lane % 8;
    const bool is_row = n < a.rows;
    const T* own = is_row ? rows + n * stride + lane / 8 * 8 : reinterpret_cast<T*>(nothing);
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(own));
    const uint32_t apart = is_row ? TILE_IN : 0;
    float* place = sums + warp * a.rows * SUM_STRIDE + lane / 4;
    const int own_tiles = (tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    // Sums lie in the order of tiles and parts.
    for (int left = own_tiles * PARTS; left > 0; --left) {
        float found[4] = {};
#pragma unroll 2
        for (int step = warp; step < steps.steps; step += FEW_WARPS) {
            steps.wait();
            steps.fetch();
            multiply_step<T>(found, steps, from + (is_row ? step * STEP_IN * 2 : 0), apart);
            steps.advance();
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 2 * (lane % 4) + i % 2;
            if (row < a.rows) place[row * SUM_STRIDE + i / 2 * 8] = found[i];
        }
        place += FEW_WARPS * a.rows * SUM_STRIDE;
    }
    __syncthreads();
    finish<T, PARTS>(a, sums, tiles);
}

}  // namespace quire
