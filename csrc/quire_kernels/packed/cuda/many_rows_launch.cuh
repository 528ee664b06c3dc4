// Launches of `many_rows`: describe x to the copy engine, choose the kernel.
#pragma once

#include "launch.cuh"
#include "many_rows.cuh"

namespace quire {

inline cudaError_t describe_rows(CUtensorMap* map, const PackedArguments& a, uint32_t box_rows) {
    static const auto encode = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                         cudaEnableDefault, &result);
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
    }();
    if (encode == nullptr) return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {cuuint64_t(a.in_features), cuuint64_t(a.rows)};
    const cuuint64_t bytes[1] = {cuuint64_t(a.x_stride) * 2};
    const cuuint32_t box[2] = {TILE_IN, box_rows}, steps[2] = {1, 1};
    const CUresult result = encode(
        map, a.dtype == BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        2, const_cast<void*>(a.x), sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename T, int ROWS, int GROUPS>
cudaError_t launch_many(const PackedArguments& a, cudaStream_t stream) {
    using Shape = ManyShape<ROWS, GROUPS>;
    CUtensorMap map;
    cudaError_t error = describe_rows(&map, a, ROWS);
    if (error != cudaSuccess) return error;
    const auto kernel = many_rows<T, ROWS, GROUPS>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 Shape::SHARED_BYTES);
    if (error != cudaSuccess) return error;
    return launch_overlapping(kernel, dim3(a.blocks), Shape::THREADS, Shape::SHARED_BYTES, stream, map,
                              a, Shares(a, ROWS));
}

template <int ROWS>
cudaError_t launch_many_of(const PackedArguments& a, cudaStream_t stream) {
    const bool crosses = a.group_shift < 7;
    if (a.dtype == BFLOAT16) {
        return crosses ? launch_many<__nv_bfloat16, ROWS, 4>(a, stream)
                       : launch_many<__nv_bfloat16, ROWS, 1>(a, stream);
    }
    return crosses ? launch_many<__half, ROWS, 4>(a, stream)
                   : launch_many<__half, ROWS, 1>(a, stream);
}

}  // namespace quire
