// Codes of 4 bits become factors of a product: see layout.py for how they lie in a word.
//
// A 4-bit code below the bits of 128 (bfloat16) or 1,024 (float16) is that number plus the code, and
// the same number plus the zero point is subtracted from it, exactly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace quire {

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    return *reinterpret_cast<const To*>(&from);
}

template <typename T>
struct Number;

template <>
struct Number<__nv_bfloat16> {
    using Pair = __nv_bfloat162;
    static constexpr uint32_t OFFSET = 0x43004300;
    static __device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
    static __device__ __forceinline__ __nv_bfloat16 rounded(float x) {
        return __float2bfloat16_rn(x);
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
    }
};

template <>
struct Number<__half> {
    using Pair = __half2;
    static constexpr uint32_t OFFSET = 0x64006400;
    static __device__ __forceinline__ float wide(__half x) { return __half2float(x); }
    static __device__ __forceinline__ __half rounded(float x) { return __float2half_rn(x); }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        return bits_as<uint32_t>(__floats2half2_rn(low, high));
    }
};

// A zero point, twice, as `code_pair` wants it.
template <typename T>
__device__ __forceinline__ uint32_t offset_of(uint32_t zero) {
    return Number<T>::OFFSET | zero | zero << 16;
}

// The codes i and i + 4 of a word, less the zero point.
template <typename T>
__device__ __forceinline__ typename Number<T>::Pair code_pair(uint32_t word, int i,
                                                              uint32_t offset) {
    using Pair = typename Number<T>::Pair;
    uint32_t both;
    // (a & b) | c
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;"
        : "=r"(both)
        : "r"(word >> 4 * i), "n"(0x000F000F), "r"(Number<T>::OFFSET));
    return __hsub2(bits_as<Pair>(both), bits_as<Pair>(offset));
}

// A scale that pairs of codes are multiplied with, as if it were exact and rounded once: bfloat16
// keeps 8 of float16's 11 bits, so what is left is kept apart. IS_SHORT: nothing is left.
template <typename T>
struct PairScale;

template <>
struct PairScale<__half> {
    static constexpr bool IS_SPLIT = false;
    __half2 all;
    template <bool IS_SHORT>
    static __device__ __forceinline__ PairScale of(__half scale) {
        return {__half2half2(scale)};
    }
    template <bool IS_SHORT>
    __device__ __forceinline__ uint32_t times(__half2 codes) const {
        return bits_as<uint32_t>(__hmul2(codes, all));
    }
};

template <>
struct PairScale<__nv_bfloat16> {
    static constexpr bool IS_SPLIT = true;
    // What is kept, and what is left.
    __nv_bfloat162 parts;
    template <bool IS_SHORT>
    static __device__ __forceinline__ PairScale of(__half scale) {
        const float wide = __half2float(scale);
        if (IS_SHORT) return {__float2bfloat162_rn(wide)};
        const __nv_bfloat16 most = __float2bfloat16_rn(wide);
        return {__halves2bfloat162(most, __float2bfloat16_rn(wide - __bfloat162float(most)))};
    }
    template <bool IS_SHORT>
    __device__ __forceinline__ uint32_t times(__nv_bfloat162 codes) const {
        const __nv_bfloat162 most = __low2bfloat162(parts);
        if (IS_SHORT) return bits_as<uint32_t>(__hmul2(codes, most));
        return bits_as<uint32_t>(__hfma2(codes, most, __hmul2(codes, __high2bfloat162(parts))));
    }
};

}  // namespace quire
