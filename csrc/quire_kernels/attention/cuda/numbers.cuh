// Conversions and functions of single numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace quire {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// Where a row's largest score starts. Finite, so that a row which has seen no key yet gives
// 2 ** (-inf - LOWEST) = 0 and never the NaN of inf - inf.
constexpr float LOWEST = -1.0e30f;

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t both);

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t both) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
}

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t both) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

// Four floats of 8 bits as two words of two floats of 16, which hold all of them.
template <__nv_fp8_interpretation_t KIND>
__device__ __forceinline__ uint2 widened(uint32_t four) {
    const __half2_raw low = __nv_cvt_fp8x2_to_halfraw2(four & 0xFFFF, KIND);
    const __half2_raw high = __nv_cvt_fp8x2_to_halfraw2(four >> 16, KIND);
    return make_uint2(low.x | uint32_t(low.y) << 16, high.x | uint32_t(high.y) << 16);
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The hyperbolic tangent: a series near 0, where 1 - 2 ** y would lose digits.
__device__ __forceinline__ float hyperbolic_tangent(float x) {
    const float square = x * x;
    const float series = 0.1333333333f - square * (0.05396825397f - square * 0.02186948854f);
    const float near = x - x * square * (0.3333333333f - square * series);
    const float size = fabsf(x);
    const float power = power_of_two(size * (-2.0f * LOG2_E));
    const float far = __fdividef(1.0f - power, 1.0f + power);
    return size < 0.25f ? near : copysignf(far, x);
}

// How scores become exponents of two: 2 ** (capped(product) * factor).
struct Scale {
    float inner;   // a product by this is the tangent's argument
    float factor;  // a product, or its tangent, by this is an exponent of two
    bool capped;

    __device__ __forceinline__ Scale(float scale, float softcap)
        : inner(softcap > 0 ? scale / softcap : 1.0f),
          factor((softcap > 0 ? softcap : scale) * LOG2_E),
          capped(softcap > 0) {}
};

// The largest and the sum over the 4 threads that share a row of a product.
__device__ __forceinline__ float largest_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

__device__ __forceinline__ float sum_of_quad(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

// Each of 4 threads has a word of 4 pieces; thread i gets all words of piece i.
__device__ __forceinline__ uint4 transposed_in_quad(const uint32_t (&words)[4], int lane) {
    uint32_t found[4];
    const int own = lane & 3;
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) {
        const int to = own ^ turn;
        const uint32_t low = to & 1 ? words[1] : words[0];
        const uint32_t high = to & 1 ? words[3] : words[2];
        const uint32_t sent = to & 2 ? high : low;
        found[turn] = turn ? __shfl_xor_sync(0xFFFFFFFF, sent, turn) : sent;
    }
    // found[turn] came from thread own ^ turn and belongs there.
    const uint32_t a = own & 1 ? found[1] : found[0], b = own & 1 ? found[0] : found[1];
    const uint32_t c = own & 1 ? found[3] : found[2], d = own & 1 ? found[2] : found[3];
    return own & 2 ? make_uint4(c, d, a, b) : make_uint4(a, b, c, d);
}

}  // namespace quire
