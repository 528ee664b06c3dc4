// Launches of kernels that call `wait_for_previous`.
#pragma once

#include <cuda_runtime.h>

namespace quire {

// Launch a kernel that may begin before the one before has ended, where the GPU can do that.
template <typename... Parameters, typename... Given>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads,
                               int shared_bytes, cudaStream_t stream, const Given&... given) {
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = major >= 9 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, given...);
}

}  // namespace quire
