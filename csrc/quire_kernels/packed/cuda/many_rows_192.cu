#include "many_rows_launch.cuh"

namespace quire {

cudaError_t multiply_rows_192(const PackedArguments& a, cudaStream_t stream) {
    return launch_many_of<192>(a, stream);
}

}  // namespace quire
