// Attention of sequences with one token: split over keys, bound by memory.
//
// A block works on one item of the plan and up to 16 heads that share a KV head. Its warps take
// turns at units of keys, each with copies under way in a ring of its own, and never wait for
// one another until their sums are merged at the end.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"
#include "warp_rows.cuh"

namespace quire {

// Shared memory of an SM: 227 KiB on Hopper, as little as 99 elsewhere.
#ifdef QUIRE_HOPPER
constexpr bool HAS_LARGE_MEMORY = true;
#else
constexpr bool HAS_LARGE_MEMORY = false;
#endif

template <typename C, int D>
struct DecodeShape {
    static constexpr int WARPS = D <= 128 || HAS_LARGE_MEMORY ? 4 : 2;
    static constexpr int THREADS = WARPS * 32;
    // At most 96 KiB, so that two blocks share an SM of Hopper, or 192: what is under way has to
    // cover the memory's latency.
    static constexpr int STAGES = (D <= 64 ? 6 : D == 96 ? 4 : 3) * (2 / C::BYTES);
    static constexpr int RING_BYTES = STAGES * UNIT_BYTES<C, D>;
    // A row's sums of a warp, apart by 8 words so that rows lie in other banks.
    static constexpr int PITCH = D + 8;
    static constexpr int SUMS_BYTES = WARPS * 16 * (PITCH + 2) * 4;
    static constexpr int SHARED_BYTES =
        WARPS * RING_BYTES > SUMS_BYTES ? WARPS * RING_BYTES : SUMS_BYTES;
};

// The blocks of the units of a warp, 32 at a time, and the next 32 under way.
struct UnitBlocks {
    const int32_t* table;
    int block_size, begin, end, stride;
    int current, ahead;

    __device__ __forceinline__ UnitBlocks(const int32_t* table, int block_size, int begin, int end,
                                          int stride)
        : table(table), block_size(block_size), begin(begin), end(end), stride(stride) {
        current = load(0);
        ahead = load(32);
    }

    __device__ __forceinline__ int load(int unit) const {
        const int key = begin + (unit + int(threadIdx.x % 32)) * stride;
        return key < end ? table[key / block_size] : 0;
    }

    // For units in ascending order, each once.
    __device__ __forceinline__ int of(int unit) {
        if (unit > 0 && unit % 32 == 0) {
            current = ahead;
            ahead = load(unit + 32);
        }
        return __shfl_sync(0xFFFFFFFF, current, unit % 32);
    }
};

// Sums of the warps of a block in shared memory.
template <typename C, int D>
struct WarpSums {
    using Shape = DecodeShape<C, D>;
    float *out, *base, *total;

    __device__ __forceinline__ explicit WarpSums(void* shared)
        : out(static_cast<float*>(shared)),
          base(out + Shape::WARPS * 16 * Shape::PITCH),
          total(base + Shape::WARPS * 16) {}

    template <typename T>
    __device__ __forceinline__ void store(const WarpRows<T, C, D>& rows) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp * 16 + lane / 4 + 8 * h;
            const float sum = sum_of_quad(rows.total[h]);
            if ((lane & 3) == 0) {
                base[row] = rows.peak[h] * rows.scale.factor;
                total[row] = sum;
            }
            if constexpr (C::IS_QUANTIZED) {
                float* place = out + row * Shape::PITCH + 4 * (lane & 3);
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    *reinterpret_cast<float4*>(place + 16 * i) = rows.four_sums(i, h);
                }
            } else {
                float* place = out + row * Shape::PITCH + 2 * (lane & 3);
#pragma unroll
                for (int i = 0; i < D / 8; ++i) {
                    *reinterpret_cast<float2*>(place + 8 * i) =
                        make_float2(rows.out[i][2 * h], rows.out[i][2 * h + 1]);
                }
            }
        }
    }

    // How much each warp's sums of a row count, times what a value's number stands for; returns the
    // exponent of the row's sum.
    __device__ __forceinline__ float weights(int row, float sink, float value_scale,
                                             float (&weight)[Shape::WARPS]) {
        float most = sink;
#pragma unroll
        for (int w = 0; w < Shape::WARPS; ++w) most = fmaxf(most, base[w * 16 + row]);
        float sum = power_of_two(sink - most);
#pragma unroll
        for (int w = 0; w < Shape::WARPS; ++w) {
            weight[w] = power_of_two(base[w * 16 + row] - most);
            sum += weight[w] * total[w * 16 + row];
        }
        const float inverse = sum > 0.0f || isnan(sum) ? value_scale / sum : 0.0f;
#pragma unroll
        for (int w = 0; w < Shape::WARPS; ++w) weight[w] *= inverse;
        return most + log2f(sum);
    }
};

// Weigh the splits of a row by their sums: a warp a head. What other blocks stored is read from
// the L2 cache, for the L1 cache may hold what lay there before.
template <typename T, typename C, int D>
__device__ __forceinline__ void merge_splits(const Arguments& a, int row, int first, int num_splits,
                                             int first_head, int num_rows) {
    constexpr int OWN = D / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int head = first_head + warp; head < first_head + num_rows;
         head += DecodeShape<C, D>::WARPS) {
        float most = LOWEST, sum = 0.0f;
        for (int i = lane; i < num_splits; i += 32) {
            const float own = __ldcg(a.partial_lse + int64_t(first + i) * a.num_heads + head);
            const float larger = fmaxf(most, own);
            sum = sum * power_of_two(most - larger) + power_of_two(own - larger);
            most = larger;
        }
        float peak = most;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            peak = fmaxf(peak, __shfl_xor_sync(0xFFFFFFFF, peak, step));
        }
        sum *= power_of_two(most - peak);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, step);
        float out[OWN] = {};
#pragma unroll 8
        for (int i = 0; i < num_splits; ++i) {
            const int64_t place = int64_t(first + i) * a.num_heads + head;
            const float weight = power_of_two(__ldcg(a.partial_lse + place) - peak);
#pragma unroll
            for (int j = 0; j < OWN; ++j) {
                out[j] += weight * __ldcg(a.partial + place * D + 32 * j + lane);
            }
        }
        T* place = static_cast<T*>(a.out) + row * a.out_stride + head * D + lane;
#pragma unroll
        for (int j = 0; j < OWN; ++j) place[32 * j] = T(out[j] / sum);
        if (a.lse && lane == 0) {
            a.lse[int64_t(row) * a.num_heads + head] = (peak + log2f(sum)) * LN_2;
        }
    }
}

// Grid (num_kv_heads * head groups, most items). The last block of a row to arrive merges it.
template <typename T, typename C, int D>
__global__ void __launch_bounds__(DecodeShape<C, D>::THREADS)
    attend_splits(const __grid_constant__ Arguments a) {
    using Shape = DecodeShape<C, D>;
    extern __shared__ __align__(128) uint8_t shared[];
    let_next_begin();
    wait_for_previous();
    const int item = blockIdx.y;
    if (item >= a.first_items[a.num_rows]) return;
    const int4 entry = reinterpret_cast<const int4*>(a.items)[item];
    const int sequence = entry.x, begin = entry.y, end = entry.z, num_splits = entry.w;
    const int seq_len = a.seq_lens[sequence];
    const int low = a.window ? max(seq_len - a.window, 0) : 0;
    const int group = a.num_heads / a.num_kv_heads;
    const int parts = (group + 15) / 16;
    const int kv_head = blockIdx.x / parts, part = blockIdx.x % parts;
    const int first_head = kv_head * group + part * 16;
    const int num_rows = min(group - part * 16, 16);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    WarpRows<T, C, D> rows(a, kv_head);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = lane / 4 + 8 * h;
        const T* queries = static_cast<const T*>(a.q) + sequence * a.q_stride_token +
                           (first_head + row) * a.q_stride_head;
        rows.load_queries(h, row < num_rows ? queries : nullptr);
        rows.from[h] = low;
        rows.to[h] = end - 1;
    }

    constexpr int STRIDE = Shape::WARPS * UNIT;
    const int own_begin = begin + warp * UNIT;
    const int num_units = max(end - own_begin + STRIDE - 1, 0) / STRIDE;
    const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) +
                          warp * Shape::RING_BYTES;
    UnitBlocks blocks(a.block_table + sequence * a.table_stride, a.block_size, own_begin, end,
                      STRIDE);
    const auto copy = [&](int unit, int slot) {
        if (unit < num_units) {
            copy_unit<C, D>(ring + slot * UNIT_BYTES<C, D>, a, blocks.of(unit), kv_head,
                            own_begin + unit * STRIDE, low, end);
        }
        copies_commit();
    };
#pragma unroll
    for (int i = 0; i < Shape::STAGES - 1; ++i) copy(i, i);
    int slot = 0, free_slot = Shape::STAGES - 1;
    for (int unit = 0; unit < num_units; ++unit) {
        copies_wait<Shape::STAGES - 2>();
        __syncwarp();
        copy(unit + Shape::STAGES - 1, free_slot);
        const int key = own_begin + unit * STRIDE;
        rows.template attend<1>(ring + slot * UNIT_BYTES<C, D>, key,
                                key < low || key + UNIT > end);
        free_slot = slot;
        slot = slot + 1 == Shape::STAGES ? 0 : slot + 1;
    }
    copies_wait<0>();
    __syncthreads();
    WarpSums<C, D> sums(shared);
    sums.store(rows);
    __syncthreads();
    const float value_scale = C::IS_QUANTIZED ? a.v_scale[kv_head] : 1.0f;

    for (int row = warp; row < num_rows; row += Shape::WARPS) {
        const int head = first_head + row;
        // A sink is one more score, which no value belongs to; the first split has it.
        const bool has_sink = a.sinks && begin <= low;
        float weight[Shape::WARPS];
        const float sink = has_sink ? fmaxf(a.sinks[head] * LOG2_E, LOWEST) : 4 * LOWEST;
        const float lse = sums.weights(row, sink, value_scale, weight);
        const int64_t place = int64_t(item) * a.num_heads + head;
        if (lane == 0 && num_splits > 1) a.partial_lse[place] = lse;
        if (lane == 0 && num_splits == 1 && a.lse) {
            a.lse[int64_t(sequence) * a.num_heads + head] = lse * LN_2;
        }
        for (int i = lane; i < D; i += 32) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < Shape::WARPS; ++w) {
                sum += weight[w] * sums.out[(w * 16 + row) * Shape::PITCH + i];
            }
            if (num_splits > 1) {
                a.partial[place * D + i] = sum;
            } else {
                static_cast<T*>(a.out)[sequence * a.out_stride + head * D + i] = T(sum);
            }
        }
    }
    if (num_splits == 1) return;
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int32_t* arrived = a.arrived + sequence * gridDim.x + blockIdx.x;
        is_last = atomicAdd(arrived, 1) == num_splits - 1;
        if (is_last) *arrived = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    merge_splits<T, C, D>(a, sequence, a.first_items[sequence], num_splits, first_head, num_rows);
}

template <typename T, typename C, int D>
cudaError_t launch_splits(const Arguments& a, cudaStream_t stream) {
    using Shape = DecodeShape<C, D>;
    const auto kernel = attend_splits<T, C, D>;
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::SHARED_BYTES);
    if (error != cudaSuccess) return error;
    const int parts = (a.num_heads / a.num_kv_heads + 15) / 16;
    return launch_overlapping(kernel, dim3(a.num_kv_heads * parts, a.max_items), Shape::THREADS,
                              Shape::SHARED_BYTES, a, stream);
}

template <int D>
cudaError_t decode_dim(const Arguments& a, cudaStream_t stream) {
    return a.dtype == BFLOAT16 ? launch_splits<__nv_bfloat16, Wide<__nv_bfloat16>, D>(a, stream)
                               : launch_splits<__half, Wide<__half>, D>(a, stream);
}

template <int D>
cudaError_t decode_quantized_dim(const Arguments& a, cudaStream_t stream) {
    if (a.dtype == BFLOAT16) {
        return a.kv_dtype == KV_E4M3 ? launch_splits<__nv_bfloat16, E4M3, D>(a, stream)
                                     : launch_splits<__nv_bfloat16, E5M2, D>(a, stream);
    }
    return a.kv_dtype == KV_E4M3 ? launch_splits<__half, E4M3, D>(a, stream)
                                 : launch_splits<__half, E5M2, D>(a, stream);
}

}  // namespace quire
