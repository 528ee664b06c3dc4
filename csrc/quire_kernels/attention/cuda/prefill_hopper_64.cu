#include "prefill_hopper_launch.cuh"

namespace quire {

cudaError_t prefill_hopper_64(const Arguments& a, cudaStream_t stream) {
    return launch_hopper<64>(a, stream);
}

}  // namespace quire
