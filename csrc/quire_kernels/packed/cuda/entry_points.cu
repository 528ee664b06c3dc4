// What Python calls: each takes one struct and a stream, and returns an error of the CUDA runtime.

#include <cuda_runtime.h>

#include "arguments.h"

namespace quire {

cudaError_t multiply_few_rows(const PackedArguments& a, cudaStream_t stream);
cudaError_t make_wide(const PackedArguments& a, cudaStream_t stream);
#ifdef QUIRE_HOPPER
cudaError_t multiply_rows_16(const PackedArguments& a, cudaStream_t stream);
cudaError_t multiply_rows_32(const PackedArguments& a, cudaStream_t stream);
cudaError_t multiply_rows_64(const PackedArguments& a, cudaStream_t stream);
cudaError_t multiply_rows_96(const PackedArguments& a, cudaStream_t stream);
cudaError_t multiply_rows_128(const PackedArguments& a, cudaStream_t stream);
cudaError_t multiply_rows_160(const PackedArguments& a, cudaStream_t stream);
cudaError_t multiply_rows_192(const PackedArguments& a, cudaStream_t stream);
cudaError_t multiply_rows_224(const PackedArguments& a, cudaStream_t stream);
cudaError_t multiply_rows_256(const PackedArguments& a, cudaStream_t stream);
#endif

}  // namespace quire

using quire::PackedArguments;

extern "C" {

const char* quire_packed_error(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// The most shared memory that a block of the current device may have.
int quire_packed_shared_bytes() {
    int device = 0, found = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&found, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return found;
}

int quire_packed_few_rows(const PackedArguments* a, void* stream) {
    return quire::multiply_few_rows(*a, static_cast<cudaStream_t>(stream));
}

int quire_packed_widen(const PackedArguments* a, void* stream) {
    return quire::make_wide(*a, static_cast<cudaStream_t>(stream));
}

int quire_packed_many_rows(const PackedArguments* a, void* stream) {
#ifdef QUIRE_HOPPER
    const auto on = static_cast<cudaStream_t>(stream);
    switch (a->tile_rows) {
        case 16: return quire::multiply_rows_16(*a, on);
        case 32: return quire::multiply_rows_32(*a, on);
        case 64: return quire::multiply_rows_64(*a, on);
        case 96: return quire::multiply_rows_96(*a, on);
        case 128: return quire::multiply_rows_128(*a, on);
        case 160: return quire::multiply_rows_160(*a, on);
        case 192: return quire::multiply_rows_192(*a, on);
        case 224: return quire::multiply_rows_224(*a, on);
        case 256: return quire::multiply_rows_256(*a, on);
    }
#endif
    return cudaErrorInvalidValue;
}

}  // extern "C"
