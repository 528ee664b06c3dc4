// Launches of `attend_hopper`: describe queries and cache to the copy engine, choose the kernel.
#pragma once

#include <cuda_runtime.h>

#include "prefill_hopper.cuh"

namespace quire {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
    static const EncodeTiled found = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                         cudaEnableDefault, &result);
        return reinterpret_cast<EncodeTiled>(entry);
    }();
    return found;
}

// Describe [planes, rows, columns] to the copy engine, with boxes of 64 columns; strides in
// elements of 2 bytes.
inline cudaError_t describe(CUtensorMap* map, const void* base, int dtype,
                            const uint64_t (&shape)[3], const int64_t (&strides)[2],
                            uint32_t box_rows, uint32_t box_planes) {
    const EncodeTiled encode = encode_tiled();
    if (encode == nullptr) return cudaErrorNotSupported;
    const cuuint64_t sizes[3] = {shape[2], shape[1], shape[0]};
    const cuuint64_t bytes[2] = {uint64_t(strides[1]) * 2, uint64_t(strides[0]) * 2};
    const cuuint32_t box[3] = {64, box_rows, box_planes}, steps[3] = {1, 1, 1};
    const CUresult result = encode(
        map, dtype == BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        3, const_cast<void*>(base), sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename T, int D, bool CAPPED>
cudaError_t launch_hopper_kernel(const Arguments& a, cudaStream_t stream) {
    using Shape = HopperShape<D>;
    const int group = a.num_heads / a.num_kv_heads;
    // Rows of a copy: a power of two, within one block.
    const int box = min(a.block_size & -a.block_size, Shape::KEYS);
    CUtensorMap q_map, cache_map;
    cudaError_t error = describe(
        &q_map, a.q, a.dtype, {uint64_t(a.num_tokens), uint64_t(a.num_heads), uint64_t(D)},
        {a.q_stride_token, a.q_stride_head}, group, Shape::ROWS / group);
    if (error != cudaSuccess) return error;
    const uint64_t rows = uint64_t(a.num_kv_heads) * a.block_size;
    error = describe(&cache_map, a.cache, a.dtype, {uint64_t(a.num_blocks), rows, 2 * D},
                     {a.block_stride, 2 * D}, box, 1);
    if (error != cudaSuccess) return error;
    const auto kernel = attend_hopper<T, D, CAPPED>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 Shape::SHARED_BYTES);
    if (error != cudaSuccess) return error;
    const int blocks = min(a.num_sms, a.most_tiles * a.num_kv_heads);
    kernel<<<blocks, Shape::THREADS, Shape::SHARED_BYTES, stream>>>(q_map, cache_map, a, box);
    return cudaGetLastError();
}

template <int D>
cudaError_t launch_hopper(const Arguments& a, cudaStream_t stream) {
    if (a.dtype == BFLOAT16) {
        return a.softcap > 0 ? launch_hopper_kernel<__nv_bfloat16, D, true>(a, stream)
                             : launch_hopper_kernel<__nv_bfloat16, D, false>(a, stream);
    }
    return a.softcap > 0 ? launch_hopper_kernel<__half, D, true>(a, stream)
                         : launch_hopper_kernel<__half, D, false>(a, stream);
}

}  // namespace quire
