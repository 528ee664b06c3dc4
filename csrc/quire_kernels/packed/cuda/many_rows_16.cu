#include "many_rows_launch.cuh"

namespace quire {

cudaError_t multiply_rows_16(const PackedArguments& a, cudaStream_t stream) {
    return launch_many_of<16>(a, stream);
}

}  // namespace quire
