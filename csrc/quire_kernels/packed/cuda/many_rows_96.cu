#include "many_rows_launch.cuh"

namespace quire {

cudaError_t multiply_rows_96(const PackedArguments& a, cudaStream_t stream) {
    return launch_many_of<96>(a, stream);
}

}  // namespace quire
