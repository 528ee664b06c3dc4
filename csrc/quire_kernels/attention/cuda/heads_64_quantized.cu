#include "decode.cuh"
#include "prefill.cuh"

namespace quire {

template cudaError_t decode_quantized_dim<64>(const Arguments&, cudaStream_t);
template cudaError_t prefill_quantized_dim<64>(const Arguments&, cudaStream_t);

}  // namespace quire
