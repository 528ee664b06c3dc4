// Products with weights of 4 and 8 bits in groups, and such weights made wide.
//
// The codes of an output are a string of bits along the inputs. A vector holds a block of them, a
// word in each lane: code i of lane n is input n * CODES + i of the block, and inputs are arranged
// so that those of code i lie together. Each weight is (code - zero) * scale; the sums of a block
// are scaled, not its weights.
#pragma once

#include "vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// Outputs and rows whose sums fill the registers.
#if defined(__AVX512F__)
enum { PACKED_OUTS = 4, PACKED_ROWS = 4 };
#else
enum { PACKED_OUTS = 2, PACKED_ROWS = 4 };
#endif
const uint32_t TWO_23 = 0x4B000000u;  // as a float: its last bits count ones

inline int64_t packed_blocks(const PackedCall &call) {
    int64_t block = LANES * (32 / call.bits);
    return (call.inputs + block - 1) / block;
}

template <class E>
void arrange_rows(const PackedCall &call, int64_t first, int64_t end) {
    typedef typename E::T T;
    int codes = 32 / call.bits;
    int64_t width = packed_blocks(call) * LANES * codes;
    for (int64_t row = first; row < end; ++row) {
        const T *x = (const T *)call.x + row * call.x_stride;
        float *wide = call.wide + row * width;
        for (int64_t block = 0; block < width; block += LANES * codes)
            for (int i = 0; i < codes; ++i)
                for (int lane = 0; lane < LANES; ++lane) {
                    int64_t k = block + lane * codes + i;
                    bool is_input = k < call.inputs;
                    int64_t from = is_input && call.order != nullptr ? call.order[k] : k;
                    wide[block + i * LANES + lane] = is_input ? E::to_float(x[from]) : 0.0f;
                }
    }
}

template <int BITS>
inline uint32_t zero_of(const PackedCall &call, int64_t group, int64_t out) {
    uint32_t byte = call.zeros[group * call.zero_group + out * BITS / 8 * call.zero_stride];
    return BITS == 8 ? byte : byte >> (out % 2 * 4) & 15;
}

inline uint16_t scale_of(const PackedCall &call, int64_t group, int64_t out) {
    return call.scales[group * call.scale_group + out * call.scale_stride];
}

// Scales of a block, and 2^23 + zero points, in the lanes that their groups have. `group` is the
// first, `next` where the one after it begins; GROUPS of one size are in a block, or 0: any.
template <int BITS, int GROUPS>
inline void numbers_of(const PackedCall &call, int64_t group, int64_t next, int64_t out, vf *scale, vf *zero) {
#if defined(__AVX512F__)
    if (GROUPS > 1) {
        // By registers: what is stored in pieces cannot be loaded whole at once.
        uint32_t bytes = 0;
        uint64_t halves = 0;
        memcpy(&bytes, call.zeros + out * BITS / 8 * call.zero_stride + group, GROUPS);
        memcpy(&halves, call.scales + out * call.scale_stride + group, 2 * GROUPS);
        const vi lane_groups = first_lanes() >> (GROUPS == 2 ? 3 : 2);
        __m512i found = _mm512_cvtepu8_epi32(_mm_cvtsi32_si128((int)bytes));
        vu spread = (vu)_mm512_permutexvar_epi32((__m512i)lane_groups, found);
        if (BITS == 4) spread = (spread >> (uint32_t)(out % 2 * 4)) & 15u;
        *zero = (vf)(spread | TWO_23);
        __m512 wide = _mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi64_si128((int64_t)halves)));
        *scale = (vf)_mm512_permutexvar_ps((__m512i)lane_groups, wide);
        return;
    }
#endif
    const int64_t codes = 32 / BITS, left = call.inputs - (group + 1) * call.group_size + next;
    const int64_t end = left < LANES * codes ? left : LANES * codes;
    vu zeros = vu{} + (TWO_23 | zero_of<BITS>(call, group, out));
#if defined(__AVX512F__)
    *scale = (vf)_mm512_cvtph_ps(_mm256_set1_epi16((short)scale_of(call, group, out)));
#else
    *scale = splat(Float16::to_float(scale_of(call, group, out)));
#endif
    for (; GROUPS == 0 && next < end; next += call.group_size) {
        const vi from = vi{} + (int32_t)(next / codes);
        *scale = first_lanes() >= from ? splat(Float16::to_float(scale_of(call, ++group, out))) : *scale;
        zeros = first_lanes() >= from ? vu{} + (TWO_23 | zero_of<BITS>(call, group, out)) : zeros;
    }
    *zero = (vf)zeros;
}

// What makes of code i of each word its distance from the zero point: a table of all of them where
// 16 lanes hold it, else 2^23 + zero, which is taken from 2^23 + code.
template <int BITS, int GROUPS>
struct Decoder {
#if defined(__AVX512F__)
    enum { IS_TABLE = GROUPS == 1 && BITS == 4 };
#else
    enum { IS_TABLE = 0 };
#endif
    // `zero` is 2^23 more than the zero point.
    static inline vf numbers_for(vf zero) {
        return IS_TABLE ? (vf)((vu)first_lanes() | TWO_23) - zero : zero;
    }
    static inline vf decode(vu words, int i, vf numbers) {
#if defined(__AVX512F__)
        if (IS_TABLE)  // looks at the last four bits
            return (vf)_mm512_permutexvar_ps((__m512i)(words >> (BITS * i)), (__m512)numbers);
#endif
        return (vf)(((words >> (BITS * i)) & ((1u << BITS) - 1)) | TWO_23) - numbers;
    }
};

template <int BITS>
inline vu words_of(const PackedCall &call, int64_t block, int64_t out) {
    const uint8_t *from = call.values + out * call.value_stride + block * LANES * 4;
    int64_t left = call.inputs * BITS / 8 - block * LANES * 4;
    if (left >= LANES * 4) return load_words(from);
    uint8_t piece[LANES * 4] = {};
    memcpy(piece, from, (size_t)left);
    return load_words(piece);
}

// `sums` [OUTS][ROWS] of some rows, from `wide` on, with some outputs.
template <int BITS, int GROUPS, int OUTS, int ROWS>
__attribute__((noinline)) void packed_sums(const PackedCall &call, int64_t out, const float *wide, float *sums) {
    const int codes = 32 / BITS;
    const int64_t blocks = packed_blocks(call), width = blocks * LANES * codes;
    vf total[OUTS][ROWS] = {};
    for (int64_t block = 0, group = 0; block < blocks; ++block) {
        const float *x = wide + block * LANES * codes;
        vf scale[OUTS], numbers[OUTS], part[OUTS][ROWS] = {};
        vu words[OUTS];
        int64_t next = (group + 1) * call.group_size - block * LANES * codes;
        for (; next <= 0; next += call.group_size) ++group;
        for (int o = 0; o < OUTS; ++o) {
            vf zero;
            words[o] = words_of<BITS>(call, block, out + o);
            numbers_of<BITS, GROUPS>(call, group, next, out + o, scale + o, &zero);
            numbers[o] = Decoder<BITS, GROUPS>::numbers_for(zero);
        }
        for (int i = 0; i < codes; ++i)
            for (int o = 0; o < OUTS; ++o) {
                vf weight = Decoder<BITS, GROUPS>::decode(words[o], i, numbers[o]);
                for (int r = 0; r < ROWS; ++r) part[o][r] += weight * load(x + r * width + i * LANES);
            }
        for (int o = 0; o < OUTS; ++o)
            for (int r = 0; r < ROWS; ++r) total[o][r] += part[o][r] * scale[o];
    }
    for (int o = 0; o < OUTS; ++o)
        for (int r = 0; r < ROWS; ++r) sums[o * ROWS + r] = sum_of(total[o][r]);
}

template <class E, int BITS, int GROUPS, int OUTS, int ROWS>
void packed_part(const PackedCall &call, int64_t out, int64_t row) {
    typedef typename E::T T;
    float sums[OUTS * ROWS];
    const int64_t width = packed_blocks(call) * LANES * (32 / BITS);
    packed_sums<BITS, GROUPS, OUTS, ROWS>(call, out, call.wide + row * width, sums);
    for (int o = 0; o < OUTS; ++o)
        for (int r = 0; r < ROWS; ++r) {
            float value = sums[o * ROWS + r];
            if (call.bias != nullptr) value += E::to_float(((const T *)call.bias)[out + o]);
            ((T *)call.out)[(row + r) * call.out_stride + out + o] = E::from_float(value);
        }
}

template <class E, int BITS, int GROUPS, int OUTS>
void packed_rows(const PackedCall &call, int64_t out) {
    int64_t row = 0;
    for (; row + PACKED_ROWS <= call.num_rows; row += PACKED_ROWS)
        packed_part<E, BITS, GROUPS, OUTS, PACKED_ROWS>(call, out, row);
    if (row + 2 <= call.num_rows) {
        packed_part<E, BITS, GROUPS, OUTS, 2>(call, out, row);
        row += 2;
    }
    if (row < call.num_rows) packed_part<E, BITS, GROUPS, OUTS, 1>(call, out, row);
}

template <class E, int BITS, int GROUPS>
void packed_outputs_of(const PackedCall &call, int64_t first, int64_t end) {
    int64_t out = first;
    for (; out + PACKED_OUTS <= end; out += PACKED_OUTS) packed_rows<E, BITS, GROUPS, PACKED_OUTS>(call, out);
    for (; out < end; ++out) packed_rows<E, BITS, 0, 1>(call, out);
}

template <class E, int BITS>
void packed_outputs_by_groups(const PackedCall &call, int64_t first, int64_t end) {
    const int64_t block = LANES * (32 / BITS);
    if (call.group_size == call.inputs || call.group_size % block == 0)
        return packed_outputs_of<E, BITS, 1>(call, first, end);
#if defined(__AVX512F__)
    bool is_dense = call.scale_group == 1 && call.zero_group == 1 && call.inputs % block == 0;
    if (is_dense && call.group_size * 2 == block) return packed_outputs_of<E, BITS, 2>(call, first, end);
    if (is_dense && call.group_size * 4 == block) return packed_outputs_of<E, BITS, 4>(call, first, end);
#endif
    packed_outputs_of<E, BITS, 0>(call, first, end);
}

template <class E>
void packed_outputs(const PackedCall &call, int64_t first, int64_t end) {
    (call.bits == 4 ? packed_outputs_by_groups<E, 4> : packed_outputs_by_groups<E, 8>)(call, first, end);
}

#if defined(__AVX512F__)
// The first of `count` codes of 4 bits, looked up among the 16 weights that they may be: as many as
// fill whole vectors, and how many these are.
inline int look_up(const uint8_t *from, const uint16_t *weights, int count, uint16_t *to) {
    __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)weights));
    int i = 0;
    for (; i + 32 <= count; i += 32) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(from + i / 2)));
        __m512i places = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
        _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(places, table));
    }
    return i;
}
inline int look_up(const uint8_t *from, const float *weights, int count, float *to) {
    __m512 table = _mm512_loadu_ps(weights);
    int i = 0;
    for (; i + 16 <= count; i += 16) {
        __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(from + i / 2)));
        __m512i places = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
        _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(places, table));
    }
    return i;
}
#else
template <class T>
inline int look_up(const uint8_t *, const T *, int, T *) { return 0; }
#endif

// What 16 codes stand for.
template <class E>
inline void weights_of(float zero, float scale, typename E::T *weights) {
    for (int code = 0; code < 16; ++code) weights[code] = E::from_float(((float)code - zero) * scale);
}
#if defined(__AVX512F__)
inline vf sixteen_weights(float zero, float scale) {
    return (__builtin_convertvector(first_lanes(), vf) - zero) * scale;
}
template <>
inline void weights_of<BFloat16>(float zero, float scale, uint16_t *weights) {
    vu bits = (vu)sixteen_weights(zero, scale);  // finite
    bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    _mm256_storeu_si256((__m256i *)weights, _mm512_cvtepi32_epi16((__m512i)bits));
}
template <>
inline void weights_of<Float16>(float zero, float scale, uint16_t *weights) {
    const int to_nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m256i halves = _mm512_cvtps_ph((__m512)sixteen_weights(zero, scale), to_nearest);
    _mm256_storeu_si256((__m256i *)weights, halves);
}
#endif

template <class E>
void widen_4_bits(const uint8_t *from, float zero, float scale, int count, typename E::T *to) {
    typename E::T weights[16];
    weights_of<E>(zero, scale, weights);
    for (int i = look_up(from, weights, count, to); i < count; i += 2) {
        to[i] = weights[from[i / 2] & 15];
        to[i + 1] = weights[from[i / 2] >> 4];
    }
}

// out[n] = the weights of output n, its columns as they are kept.
template <class E, int BITS>
void widen_outputs_of(const PackedCall &call, int64_t first, int64_t end) {
    for (int64_t out = first; out < end; ++out)
        for (int64_t group = 0; group * call.group_size < call.inputs; ++group) {
            int64_t begin = group * call.group_size;
            const uint8_t *from = call.values + out * call.value_stride + begin * BITS / 8;
            float scale = Float16::to_float(scale_of(call, group, out)), zero = (float)zero_of<BITS>(call, group, out);
            typename E::T *to = (typename E::T *)call.out + out * call.out_stride + begin;
            if (BITS == 4)
                widen_4_bits<E>(from, zero, scale, (int)call.group_size, to);
            else
                for (int i = 0; i < call.group_size; ++i) to[i] = E::from_float(((float)from[i] - zero) * scale);
        }
}

template <class E>
void widen_outputs(const PackedCall &call, int64_t first, int64_t end) {
    (call.bits == 4 ? widen_outputs_of<E, 4> : widen_outputs_of<E, 8>)(call, first, end);
}

}  // namespace
