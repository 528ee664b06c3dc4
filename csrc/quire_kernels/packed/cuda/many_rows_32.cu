#include "many_rows_launch.cuh"

namespace quire {

cudaError_t multiply_rows_32(const PackedArguments& a, cudaStream_t stream) {
    return launch_many_of<32>(a, stream);
}

}  // namespace quire
