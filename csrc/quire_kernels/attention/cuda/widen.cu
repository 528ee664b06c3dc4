// Blocks of a quantized cache made wide, for the kernels whose products take keys and values from
// where they were copied. Prompts read a key as often as they have tiles of queries, so that one
// more pass over the cache costs them little.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "numbers.cuh"

namespace quire {

constexpr int WIDEN_THREADS = 128;

// Grid (most blocks, num_kv_heads). `wide_blocks` has the number of blocks and another number; then
// (sequence, which of its blocks) of each, in the order in which they come to lie in `wide`, and
// `wide_table` gets where that is.
template <typename T, __nv_fp8_interpretation_t KIND>
__global__ void __launch_bounds__(WIDEN_THREADS)
    widen_blocks(const __grid_constant__ Arguments a) {
    const int entry = blockIdx.x, kv_head = blockIdx.y;
    if (entry >= a.wide_blocks[0]) return;
    const int sequence = a.wide_blocks[2 + 2 * entry], number = a.wide_blocks[3 + 2 * entry];
    const int block = a.block_table[sequence * a.table_stride + number];
    if (kv_head == 0 && threadIdx.x == 0) a.wide_table[sequence * a.wide_stride + number] = entry;
    const int row = 2 * a.head_dim, size = a.block_size * row;
    const uint8_t* from =
        static_cast<const uint8_t*>(a.cache) + block * a.block_stride + int64_t(kv_head) * size;
    T* to = static_cast<T*>(a.wide) + (int64_t(entry) * a.num_kv_heads + kv_head) * size;
    const float k_scale = a.k_scale[kv_head], v_scale = a.v_scale[kv_head];
    for (int i = threadIdx.x * 16; i < size; i += WIDEN_THREADS * 16) {
        const uint4 piece = *reinterpret_cast<const uint4*>(from + i);
        const float scale = i % row < a.head_dim ? k_scale : v_scale;
        const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
        uint32_t found[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint2 halves = widened<KIND>(words[j]);
            const float2 low = unpack<__half>(halves.x), high = unpack<__half>(halves.y);
            found[2 * j] = pack<T>(low.x * scale, low.y * scale);
            found[2 * j + 1] = pack<T>(high.x * scale, high.y * scale);
        }
        uint4* place = reinterpret_cast<uint4*>(to + i);
        place[0] = make_uint4(found[0], found[1], found[2], found[3]);
        place[1] = make_uint4(found[4], found[5], found[6], found[7]);
    }
}

template <typename T>
static auto widen_kernel(int kv_dtype) {
    return kv_dtype == KV_E4M3 ? widen_blocks<T, __NV_E4M3> : widen_blocks<T, __NV_E5M2>;
}

cudaError_t widen(const Arguments& a, cudaStream_t stream) {
    const auto kernel = a.dtype == BFLOAT16 ? widen_kernel<__nv_bfloat16>(a.kv_dtype)
                                            : widen_kernel<__half>(a.kv_dtype);
    kernel<<<dim3(a.most_wide, a.num_kv_heads), WIDEN_THREADS, 0, stream>>>(a);
    return cudaGetLastError();
}

}  // namespace quire
