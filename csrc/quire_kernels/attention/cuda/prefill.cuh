// Attention of sequences with several tokens, for any GPU from 8.0 on.
//
// A block works on one tile: 64 rows, each a (token, head) pair of one KV head, heads fastest,
// 16 of them a warp. Tiles of keys and values are copied ahead of their use into a ring.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"
#include "query_tile.cuh"
#include "warp_rows.cuh"

namespace quire {

template <typename C, int D>
struct PrefillShape {
    static constexpr int ROWS = 64;
    static constexpr int WARPS = ROWS / 16;
    static constexpr int THREADS = WARPS * 32;
    static constexpr int KEYS = D <= 128 ? 64 : 32;
    static constexpr int UNITS = KEYS / UNIT;
    static constexpr int STAGES = 3;
    static constexpr int STAGE_BYTES = UNITS * UNIT_BYTES<C, D>;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
};

template <typename C, int D>
__device__ __forceinline__ void copy_keys(uint32_t to, const Arguments& a, const QueryTile& tile,
                                          int n) {
    using Shape = PrefillShape<C, D>;
    const int warp = threadIdx.x / 32;
    if (warp < Shape::UNITS && n <= tile.last) {
        const int key = n * Shape::KEYS + warp * UNIT;
        const int32_t* table = a.block_table + tile.sequence * a.table_stride;
        const bool is_wanted = key < tile.high && key + UNIT > tile.low;
        copy_unit<C, D>(to + warp * UNIT_BYTES<C, D>, a, is_wanted ? table[key / a.block_size] : 0,
                        tile.kv_head, key, tile.low, tile.high);
    }
    copies_commit();
}

// Divide a row by its sum, of which a sink is a part that no value belongs to, and store it.
template <typename T, typename C, int D>
__device__ __forceinline__ void store_row(const Arguments& a, const QueryTile& tile,
                                          const WarpRows<T, C, D>& rows, int row, int h) {
    const int group = a.num_heads / a.num_kv_heads;
    const bool is_row = row < tile.num_tokens * group;
    const int64_t token = tile.token + row / group;
    const int head = tile.kv_head * group + row % group;
    const RowEnd end(a, sum_of_quad(rows.total[h]), rows.peak[h] * rows.scale.factor, head, is_row);
    const int lane = threadIdx.x % 32;
    if (a.lse && is_row && (lane & 3) == 0) a.lse[token * a.num_heads + head] = end.lse;
    if constexpr (C::IS_QUANTIZED) {
        const float factor = end.inverse * a.v_scale[tile.kv_head];
        T* place = static_cast<T*>(a.out) + token * a.out_stride + head * D + 4 * (lane & 3);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            const float4 sums = rows.four_sums(i, h);
            const uint2 piece = make_uint2(pack<T>(sums.x * factor, sums.y * factor),
                                           pack<T>(sums.z * factor, sums.w * factor));
            if (is_row) *reinterpret_cast<uint2*>(place + 16 * i) = piece;
        }
        return;
    }
    T* place = static_cast<T*>(a.out) + token * a.out_stride + head * D + 8 * (lane & 3);
#pragma unroll
    for (int c = 0; c < D / 32; ++c) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* pair = rows.out[4 * c + i] + 2 * h;
            words[i] = pack<T>(pair[0] * end.inverse, pair[1] * end.inverse);
        }
        const uint4 piece = transposed_in_quad(words, lane);
        if (is_row) *reinterpret_cast<uint4*>(place + 32 * c) = piece;
    }
}

// Grid (most tiles * num_kv_heads).
template <typename T, typename C, int D>
__global__ void __launch_bounds__(PrefillShape<C, D>::THREADS)
    attend_tiles(const __grid_constant__ Arguments a) {
    using Shape = PrefillShape<C, D>;
    extern __shared__ __align__(128) uint8_t shared[];
    let_next_begin();
    wait_for_previous();
    if (static_cast<int>(blockIdx.x) >= a.tiles[0] * a.num_kv_heads) return;
    const QueryTile tile(a, blockIdx.x, Shape::ROWS, Shape::KEYS);
    const int group = a.num_heads / a.num_kv_heads;
    const int first_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    WarpRows<T, C, D> rows(a, tile.kv_head);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = first_row + 8 * h;
        const int64_t token = tile.token + row / group;
        const T* queries = static_cast<const T*>(a.q) + token * a.q_stride_token +
                           (tile.kv_head * group + row % group) * a.q_stride_head;
        rows.load_queries(h, row < tile.num_tokens * group ? queries : nullptr);
        // A padding row sees the last token's keys.
        rows.to[h] = min(tile.position + row / group, tile.high - 1);
        rows.from[h] = a.window ? rows.to[h] - a.window + 1 : 0;
    }
    const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#pragma unroll
    for (int i = 0; i < Shape::STAGES - 1; ++i) {
        copy_keys<C, D>(ring + i * Shape::STAGE_BYTES, a, tile, tile.first + i);
    }
    int slot = 0, free_slot = Shape::STAGES - 1;
    for (int n = tile.first; n <= tile.last; ++n) {
        copies_wait<Shape::STAGES - 2>();
        __syncthreads();
        copy_keys<C, D>(ring + free_slot * Shape::STAGE_BYTES, a, tile, n + Shape::STAGES - 1);
        rows.template attend<Shape::UNITS>(ring + slot * Shape::STAGE_BYTES, n * Shape::KEYS,
                                           tile.hides(n, Shape::KEYS, a.window));
        free_slot = slot;
        slot = slot + 1 == Shape::STAGES ? 0 : slot + 1;
    }
    copies_wait<0>();
#pragma unroll
    for (int h = 0; h < 2; ++h) store_row(a, tile, rows, first_row + 8 * h, h);
}

template <typename T, typename C, int D>
cudaError_t launch_tiles(const Arguments& a, cudaStream_t stream) {
    using Shape = PrefillShape<C, D>;
    const auto kernel = attend_tiles<T, C, D>;
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::SHARED_BYTES);
    if (error != cudaSuccess) return error;
    return launch_overlapping(kernel, dim3(a.num_kv_heads * a.most_tiles), Shape::THREADS,
                              Shape::SHARED_BYTES, a, stream);
}

template <int D>
cudaError_t prefill_dim(const Arguments& a, cudaStream_t stream) {
    return a.dtype == BFLOAT16 ? launch_tiles<__nv_bfloat16, Wide<__nv_bfloat16>, D>(a, stream)
                               : launch_tiles<__half, Wide<__half>, D>(a, stream);
}

template <int D>
cudaError_t prefill_quantized_dim(const Arguments& a, cudaStream_t stream) {
    if (a.dtype == BFLOAT16) {
        return a.kv_dtype == KV_E4M3 ? launch_tiles<__nv_bfloat16, E4M3, D>(a, stream)
                                     : launch_tiles<__nv_bfloat16, E5M2, D>(a, stream);
    }
    return a.kv_dtype == KV_E4M3 ? launch_tiles<__half, E4M3, D>(a, stream)
                                 : launch_tiles<__half, E5M2, D>(a, stream);
}

}  // namespace quire
