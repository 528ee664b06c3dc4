// Vectors of the instruction set that this file is compiled for, and elements as floats.
// All is local to the file that includes it: one library holds several instruction sets.
#pragma once

#include <math.h>
#include <string.h>

#include "interface.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
enum { LANES = 16, MOST_ROWS = 8 };
#elif defined(__AVX2__)
enum { LANES = 8, MOST_ROWS = 4 };
#else
enum { LANES = 4, MOST_ROWS = 4 };
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef float loose_vf __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t loose_vu __attribute__((vector_size(LANES * 4), aligned(1), may_alias));

inline vf load(const float *p) { return *(const loose_vf *)p; }
inline void store(float *p, vf x) { *(loose_vf *)p = x; }
inline vu load_words(const void *p) { return *(const loose_vu *)p; }
inline vf splat(float x) { return vf{} + x; }

inline vi first_lanes() {
    vi lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = i;
    return lanes;
}

// Lanes are joined by halves, in an order that depends on LANES alone.
typedef float vf4 __attribute__((vector_size(16)));

inline vf4 higher(vf4 a, vf4 b) { return a > b ? a : b; }

inline void to_quarters(vf x, vf4 *out) { memcpy(out, &x, sizeof x); }

inline float sum_of(vf x) {
    vf4 part[LANES / 4];
    to_quarters(x, part);
    for (int width = LANES / 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

inline float max_of(vf x) {
    vf4 part[LANES / 4];
    to_quarters(x, part);
    for (int width = LANES / 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] = higher(part[i], part[i + width]);
    float a = part[0][0] > part[0][2] ? part[0][0] : part[0][2];
    float b = part[0][1] > part[0][3] ? part[0][1] : part[0][3];
    return a > b ? a : b;
}

// exp(x) for x <= 88: 2^n times the Taylor series around 0, whose rest is below 2^-26 on the
// halves of ln 2. 0 below -87; NaN stays NaN.
inline vf exp_of(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    vf clamped = x < splat(-87.0f) ? splat(-87.0f) : x;
    vf shifted = clamped * 1.44269504089f + magic;
    vf n = shifted - magic;
    vf r = clamped - n * 0.693145751953125f;
    r = r - n * 1.42860682030941723e-6f;
    vf y = splat(1.0f / 5040);
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    vi power = (((vi)shifted - 0x4B400000) + 127) << 23;
    return x < splat(-87.0f) ? vf{} : y * (vf)power;
}

inline float exp_of(float x) { return exp_of(splat(x))[0]; }

// tanh(x): its series near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline vf tanh_of(vf x) {
    vf a = x < vf{} ? -x : x;
    vf s = x * x;
    vf y = splat(-1382.0f / 155925);
    y = y * s + 62.0f / 2835;
    y = y * s - 17.0f / 315;
    y = y * s + 2.0f / 15;
    y = y * s - 1.0f / 3;
    y = x + x * s * y;
    vf most = a > splat(10.0f) ? splat(10.0f) : a;
    vf far = 1.0f - 2.0f / (exp_of(most + most) + 1.0f);
    far = x < vf{} ? -far : far;
    return a < splat(0.3f) ? y : far;
}

inline float bits_to_float(uint32_t x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}

inline uint32_t float_to_bits(float f) {
    uint32_t x;
    memcpy(&x, &f, 4);
    return x;
}

// An element type: how a word becomes PAIR vectors of floats, and one element a float and back.
struct Float32 {
    typedef float T;
    enum { PAIR = 1, IS_BF16 = 0 };
    static inline void widen(vu words, vf *out) { out[0] = (vf)words; }
    static inline float to_float(T x) { return x; }
    static inline T from_float(float x) { return x; }
};

struct BFloat16 {
    typedef uint16_t T;
    enum { PAIR = 2, IS_BF16 = 1 };
    static inline void widen(vu words, vf *out) {
        out[0] = (vf)(words << 16);
        out[1] = (vf)(words & 0xFFFF0000u);
    }
    static inline float to_float(T x) { return bits_to_float((uint32_t)x << 16); }
    static inline T from_float(float f) {
        uint32_t x = float_to_bits(f);
        uint32_t rounded = (x + 0x7FFF + ((x >> 16) & 1)) >> 16;
        return (x & 0x7FFFFFFF) > 0x7F800000 ? (T)((x >> 16) | 0x40) : (T)rounded;
    }
};

struct Float16 {
    typedef uint16_t T;
    enum { PAIR = 2, IS_BF16 = 0 };
    static inline vf widen_low(vu half) {
        vu magnitude = half & 0x7FFFu;
        vf scaled = (vf)(magnitude << 13) * 5.192296858534828e33f;  // 2^112, the biases' difference
        vu special = (magnitude << 13) | 0x7F800000u;
        vu bits = magnitude >= 0x7C00u ? special : (vu)scaled;
        return (vf)(bits | ((half & 0x8000u) << 16));
    }
    static inline void widen(vu words, vf *out) {
        out[0] = widen_low(words & 0xFFFFu);
        out[1] = widen_low(words >> 16);
    }
    static inline float to_float(T h) {
        uint32_t magnitude = h & 0x7FFFu, sign = (uint32_t)(h & 0x8000u) << 16;
        if (magnitude >= 0x7C00u) return bits_to_float(sign | 0x7F800000u | (magnitude << 13));
        float scaled = bits_to_float(magnitude << 13) * 5.192296858534828e33f;
        return bits_to_float(sign | float_to_bits(scaled));
    }
    static inline T from_float(float f) {
        uint32_t x = float_to_bits(f), sign = (x >> 16) & 0x8000u;
        x &= 0x7FFFFFFFu;
        if (x > 0x7F800000u) return (T)(sign | 0x7E00u);
        if (x >= 0x477FF000u) return (T)(sign | 0x7C00u);
        if (x < 0x38800000u)  // subnormal: 0.5 has the wanted unit, 2^-24
            return (T)(sign | (float_to_bits(bits_to_float(x) + 0.5f) - 0x3F000000u));
        x += 0xFFFu + ((x >> 13) & 1);
        return (T)(sign | ((x - 0x38000000u) >> 13));
    }
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Sizes that follow from a spec, for elements E.
template <class E>
struct Sizes {
    int group, key_words, value_words, value_tiles, padded_value, rows;
    int64_t key_bytes, value_row, head_bytes;
    explicit Sizes(const Spec &spec) {
        group = spec.num_heads / spec.num_kv_heads;
        key_words = ceil_div(spec.head_dim, E::PAIR);
        value_words = ceil_div(spec.value_dim, E::PAIR);
        value_tiles = ceil_div(value_words, LANES);
        padded_value = value_tiles * LANES * E::PAIR;
        rows = group > TILE_ROWS ? group : TILE_ROWS;
        key_bytes = (int64_t)key_words * spec.block_size * 4;
        value_row = (int64_t)spec.value_dim * sizeof(typename E::T);
        head_bytes = key_bytes + value_row * spec.block_size;
    }
};

}  // namespace
