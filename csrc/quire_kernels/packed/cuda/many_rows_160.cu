#include "many_rows_launch.cuh"

namespace quire {

cudaError_t multiply_rows_160(const PackedArguments& a, cudaStream_t stream) {
    return launch_many_of<160>(a, stream);
}

}  // namespace quire
