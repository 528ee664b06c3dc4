#include "prefill_hopper_launch.cuh"

namespace quire {

cudaError_t prefill_hopper_256(const Arguments& a, cudaStream_t stream) {
    return launch_hopper<256>(a, stream);
}

}  // namespace quire
