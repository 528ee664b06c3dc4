#include "many_rows_launch.cuh"

namespace quire {

cudaError_t multiply_rows_224(const PackedArguments& a, cudaStream_t stream) {
    return launch_many_of<224>(a, stream);
}

}  // namespace quire
