#include "few_rows.cuh"

#include "launch.cuh"

namespace quire {

template <typename T, int GROUPS, int PARTS>
cudaError_t launch_few(const PackedArguments& a, cudaStream_t stream) {
    const int shared_bytes = few_rows_shared_bytes<GROUPS, PARTS>(a.rows, a.in_features);
    const auto kernel = few_rows<T, GROUPS, PARTS>;
    cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    int blocks = 0;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, FEW_THREADS,
                                                          shared_bytes);
    if (error != cudaSuccess) return error;
    const int tiles = a.num_out / TILE_OUT / PARTS;
    const dim3 grid(min(tiles, max(1, blocks) * a.num_sms));
    return launch_overlapping(kernel, grid, FEW_THREADS, shared_bytes, stream, a);
}

template <typename T>
cudaError_t launch_few_of(const PackedArguments& a, cudaStream_t stream) {
    const bool crosses = a.group_shift == 5;
    if (a.gated) return crosses ? launch_few<T, 2, 2>(a, stream) : launch_few<T, 1, 2>(a, stream);
    return crosses ? launch_few<T, 2, 1>(a, stream) : launch_few<T, 1, 1>(a, stream);
}

cudaError_t multiply_few_rows(const PackedArguments& a, cudaStream_t stream) {
    return a.dtype == BFLOAT16 ? launch_few_of<__nv_bfloat16>(a, stream)
                               : launch_few_of<__half>(a, stream);
}

}  // namespace quire
