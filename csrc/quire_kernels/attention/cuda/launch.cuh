// Launches on a stream of kernels whose only argument is `Arguments`.
#pragma once

#include <cuda_runtime.h>

#include "arguments.h"

namespace quire {

// Answer whether the current device has capability `major` or more.
inline bool has_capability(int major) {
    int device = 0, found = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&found, cudaDevAttrComputeCapabilityMajor, device);
    return found >= major;
}

// Launch a kernel that calls `wait_for_previous`: it may begin before the kernel before has ended.
inline cudaError_t launch_overlapping(void (*kernel)(Arguments), dim3 grid, int threads,
                                      int shared_bytes, const Arguments& a, cudaStream_t stream) {
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = has_capability(9) ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace quire
