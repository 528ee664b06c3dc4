#include "few_rows.cuh"

#include "launch.cuh"

namespace quire {

// Shared memory of a block; no GPU from compute capability 8.0 on gives less than 99 KiB.
int shared_limit() {
    int device = 0, found = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&found, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return found;
}

template <typename T, int GROUPS, int PARTS>
cudaError_t launch_few(const PackedArguments& a, cudaStream_t stream) {
    const int fixed = few_rows_bytes(a.rows, a.in_features, GROUPS);
    const int per_tile = tile_sum_bytes(a.rows, PARTS);
    const int tiles = a.num_out / TILE_OUT / PARTS;
    const int most = (shared_limit() - fixed) / per_tile;
    if (most < 1) return cudaErrorInvalidValue;
    // Blocks of equally many tiles, one an SM unless shared memory has no room for their sums.
    const int own = min(most, (tiles + a.num_sms - 1) / a.num_sms);
    const int blocks = (tiles + own - 1) / own;
    const int shared_bytes = fixed + own * per_tile;
    const auto kernel = few_rows<T, GROUPS, PARTS>;
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    return launch_overlapping(kernel, dim3(blocks), FEW_THREADS, shared_bytes, stream, a);
}

template <typename T, int PARTS>
cudaError_t launch_few_of(const PackedArguments& a, cudaStream_t stream) {
    if (a.group_shift == 5) return launch_few<T, 4, PARTS>(a, stream);
    if (a.group_shift == 6) return launch_few<T, 2, PARTS>(a, stream);
    return launch_few<T, 1, PARTS>(a, stream);
}

template <typename T>
cudaError_t launch_few_of(const PackedArguments& a, cudaStream_t stream) {
    return a.gated ? launch_few_of<T, 2>(a, stream) : launch_few_of<T, 1>(a, stream);
}

cudaError_t multiply_few_rows(const PackedArguments& a, cudaStream_t stream) {
    return a.dtype == BFLOAT16 ? launch_few_of<__nv_bfloat16>(a, stream)
                               : launch_few_of<__half>(a, stream);
}

}  // namespace quire
