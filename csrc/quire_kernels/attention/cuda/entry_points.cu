// What Python calls: each takes one struct and a stream, and returns an error of the CUDA runtime.

#include <cuda_runtime.h>

#include "launch.cuh"

namespace quire {

cudaError_t plan(const Arguments& a, cudaStream_t stream);
cudaError_t widen(const Arguments& a, cudaStream_t stream);
template <int D>
cudaError_t decode_dim(const Arguments& a, cudaStream_t stream);
template <int D>
cudaError_t prefill_dim(const Arguments& a, cudaStream_t stream);
template <int D>
cudaError_t decode_quantized_dim(const Arguments& a, cudaStream_t stream);
template <int D>
cudaError_t prefill_quantized_dim(const Arguments& a, cudaStream_t stream);
cudaError_t prefill_hopper_64(const Arguments& a, cudaStream_t stream);
cudaError_t prefill_hopper_128(const Arguments& a, cudaStream_t stream);
cudaError_t prefill_hopper_256(const Arguments& a, cudaStream_t stream);

// Return the kernel for tiles of 128 rows, null where there is none: its products take keys and
// values from where they were copied, and those of a quantized cache have to be made wide first.
static cudaError_t (*hopper_kernel(int head_dim, int kv_dtype))(const Arguments&, cudaStream_t) {
#ifdef QUIRE_HOPPER
    if (kv_dtype != KV_AS_DTYPE) return nullptr;
    if (head_dim == 64) return prefill_hopper_64;
    if (head_dim == 128) return prefill_hopper_128;
    if (head_dim == 256) return prefill_hopper_256;
#endif
    return nullptr;
}

}  // namespace quire

using quire::Arguments;

extern "C" {

const char* quire_attention_error(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Rows (token, head) of a tile of the sequences with several tokens.
int quire_attention_tile_rows(int head_dim, int kv_dtype) {
    return quire::hopper_kernel(head_dim, kv_dtype) ? 128 : 64;
}

int quire_attention_plan(const Arguments* a, void* stream) {
    return quire::plan(*a, static_cast<cudaStream_t>(stream));
}

int quire_attention_widen(const Arguments* a, void* stream) {
    return quire::widen(*a, static_cast<cudaStream_t>(stream));
}

int quire_attention_decode(const Arguments* a, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (a->kv_dtype != quire::KV_AS_DTYPE) {
        switch (a->head_dim) {
            case 64: return quire::decode_quantized_dim<64>(*a, on);
            case 128: return quire::decode_quantized_dim<128>(*a, on);
            case 256: return quire::decode_quantized_dim<256>(*a, on);
        }
        return cudaErrorInvalidValue;
    }
    switch (a->head_dim) {
        case 64: return quire::decode_dim<64>(*a, on);
        case 96: return quire::decode_dim<96>(*a, on);
        case 128: return quire::decode_dim<128>(*a, on);
        case 256: return quire::decode_dim<256>(*a, on);
    }
    return cudaErrorInvalidValue;
}

int quire_attention_prefill(const Arguments* a, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (const auto kernel = quire::hopper_kernel(a->head_dim, a->kv_dtype)) return kernel(*a, on);
    if (a->kv_dtype != quire::KV_AS_DTYPE) {
        switch (a->head_dim) {
            case 64: return quire::prefill_quantized_dim<64>(*a, on);
            case 128: return quire::prefill_quantized_dim<128>(*a, on);
            case 256: return quire::prefill_quantized_dim<256>(*a, on);
        }
        return cudaErrorInvalidValue;
    }
    switch (a->head_dim) {
        case 64: return quire::prefill_dim<64>(*a, on);
        case 96: return quire::prefill_dim<96>(*a, on);
        case 128: return quire::prefill_dim<128>(*a, on);
        case 256: return quire::prefill_dim<256>(*a, on);
    }
    return cudaErrorInvalidValue;
}

}  // extern "C"
