// Codes as a plain matrix of numbers, for cuBLAS.

#include "../../attention/cuda/numbers.cuh"
#include "../../attention/cuda/tensor_cores.cuh"
#include "arguments.h"
#include "codes.cuh"
#include "launch.cuh"

namespace quire {

constexpr int WIDEN_WARPS = 8;

// A warp makes a tile wide: 16 rows of 64 numbers. The four lanes of a row trade their pairs for pieces
// of 8 neighbours, so that they are written 16 bytes at a time.
template <typename T, int GROUPS>
__global__ void __launch_bounds__(32 * WIDEN_WARPS) widen(const PackedArguments a) {
    let_next_begin();
    const int lane = threadIdx.x % 32, row = lane / 4;
    const int chunks = a.in_features / TILE_IN;
    const int chunk = blockIdx.x * WIDEN_WARPS + threadIdx.x / 32, tile = blockIdx.y;
    if (chunk >= chunks) return wait_for_previous();
    const uint4 codes = __ldcs(reinterpret_cast<const uint4*>(
        a.tiles + (int64_t(tile) * chunks + chunk) * TILE_BYTES + lane * 16));
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint4 pieces[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int output = tile * TILE_OUT + row + 8 * h;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int input = chunk * TILE_IN + side * 32 * (GROUPS - 1);
            const int group = input >> a.group_shift;
            const auto scale = PairScale<T>::template of<false>(
                bits_as<__half>(a.scales[group * a.scale_stride + output]));
            const uint32_t zero = a.zeros[group * a.zero_stride + output / 2] >> output % 2 * 4;
            const uint32_t offset = offset_of<T>(zero & 15);
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t word = words[2 * side + i / 2];
                pairs[i] = scale.template times<false>(code_pair<T>(word, h + i % 2 * 2, offset));
            }
            pieces[h][side] = transposed_in_quad(pairs, lane);
        }
    }
    wait_for_previous();
    T* out = static_cast<T*>(a.out) + chunk * TILE_IN + lane % 4 * 8;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        T* place = out + (tile * TILE_OUT + row + 8 * h) * a.out_stride;
        *reinterpret_cast<uint4*>(place) = pieces[h][0];
        *reinterpret_cast<uint4*>(place + 32) = pieces[h][1];
    }
}

template <typename T>
cudaError_t launch_widen(const PackedArguments& a, cudaStream_t stream) {
    const int chunks = a.in_features / TILE_IN;
    const dim3 grid((chunks + WIDEN_WARPS - 1) / WIDEN_WARPS, a.num_out / TILE_OUT);
    const auto kernel = a.group_shift == 5 ? widen<T, 2> : widen<T, 1>;
    return launch_overlapping(kernel, grid, 32 * WIDEN_WARPS, 0, stream, a);
}

cudaError_t make_wide(const PackedArguments& a, cudaStream_t stream) {
    return a.dtype == BFLOAT16 ? launch_widen<__nv_bfloat16>(a, stream)
                               : launch_widen<__half>(a, stream);
}

}  // namespace quire
