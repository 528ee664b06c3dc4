#include "prefill_hopper_launch.cuh"

namespace quire {

cudaError_t prefill_hopper_128(const Arguments& a, cudaStream_t stream) {
    return launch_hopper<128>(a, stream);
}

}  // namespace quire
