// Products of 8-bit integers, summed exactly in 32 bits.
//
// A tile of the weight is 16 outputs by all inputs, four inputs at a time: [inputs / 4][16][4], the
// values plus 128, so that they are unsigned and inputs signed, as processors multiply them. What
// the 128 add is a sum of the row's inputs, and subtracted at the end.
#pragma once

#include "rows.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// Rows and tiles whose sums fill the registers; of fewer rows FEW_ROWS_TILES.
#if defined(__AVX512F__)
enum { INT8_ROWS = 8, INT8_TILES = 2, FEW_ROWS_TILES = 4 };
#else
enum { INT8_ROWS = 4, INT8_TILES = 1, FEW_ROWS_TILES = 2 };
#endif
enum { TILE_OUT = 16, TILE_VECTORS = TILE_OUT / LANES };

#if defined(__AVX512VNNI__)
// Four inputs in each lane.
struct FourInputs {
    vi four;
    explicit FourInputs(uint32_t bytes) : four(vi{} + (int32_t)bytes) {}
};
inline vi add_products(vi sums, vu weights, const FourInputs &x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)x.four);
}
#else
// The first and third, and the second and fourth, in 16 bits.
struct FourInputs {
    vi even, odd;
    explicit FourInputs(uint32_t bytes) {
        uint32_t first = (uint16_t)(int8_t)bytes, second = (uint16_t)(int8_t)(bytes >> 8);
        uint32_t third = (uint16_t)(int8_t)(bytes >> 16), fourth = (uint16_t)(int8_t)(bytes >> 24);
        even = vi{} + (int32_t)(first | third << 16);
        odd = vi{} + (int32_t)(second | fourth << 16);
    }
};
inline vi pairs(vu a, vi b) {
#if defined(__AVX512BW__)
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return (vi)(a & 0xFFFFu) * ((b << 16) >> 16) + (vi)(a >> 16) * (b >> 16);
#endif
}
inline vi add_products(vi sums, vu weights, const FourInputs &x) {
    return sums + pairs(weights & 0x00FF00FFu, x.even) + pairs((weights >> 8) & 0x00FF00FFu, x.odd);
}
#endif

// Round rows, where they are not yet, and make of unsigned values around 128 signed ones.
template <class E>
void int8_rows(const Int8Call &call, int64_t first, int64_t end) {
    if (call.x != nullptr) {
        RowsCall rows = {(void *)call.x, nullptr, nullptr, call.values, call.num_rows, call.inputs, 0, call.x_scales};
        quantize_rows<E>(rows, first, end);
    }
    for (int64_t row = first; row < end; ++row) {
        uint8_t *values = call.values + row * call.inputs;
        int32_t sum = 0;
        for (int64_t i = 0; i < call.inputs; ++i) {
            values[i] ^= 0x80;
            sum += (int8_t)values[i];
        }
        call.sums[row] = sum;
    }
}

// Sums of ROWS rows with TILES tiles that lie one after another: `sums` [ROWS][TILES * 16].
template <int ROWS, int TILES>
__attribute__((noinline)) void int8_sums(const Int8Call &call, const uint8_t *tiles, const uint8_t *x, int32_t *sums) {
    const int64_t tile_bytes = call.inputs * TILE_OUT;
    vi total[ROWS][TILES * TILE_VECTORS] = {};
    for (int64_t k = 0; k < call.inputs; k += 4) {
        vu weights[TILES * TILE_VECTORS];
        for (int t = 0; t < TILES; ++t)
            for (int n = 0; n < TILE_VECTORS; ++n)
                weights[t * TILE_VECTORS + n] = load_words(tiles + t * tile_bytes + k * TILE_OUT + n * LANES * 4);
        for (int row = 0; row < ROWS; ++row) {
            uint32_t bytes;
            memcpy(&bytes, x + row * call.inputs + k, 4);
            FourInputs four(bytes);
            for (int n = 0; n < TILES * TILE_VECTORS; ++n)
                total[row][n] = add_products(total[row][n], weights[n], four);
        }
    }
    memcpy(sums, total, sizeof total);
}

template <class E>
void int8_store(const Int8Call &call, int64_t row, int64_t first_out, int width, const int32_t *sums) {
    typedef typename E::T T;
    T *out = (T *)call.out + row * call.outputs + first_out;
    const T *bias = (const T *)call.bias;
    int count = call.outputs - first_out < width ? (int)(call.outputs - first_out) : width;
    int32_t offset = 128 * call.sums[row];
    float scale = call.x_scales[row];
    for (int n = 0; n < count; ++n) {
        float value = (float)(sums[n] - offset) * call.scales[first_out + n] * scale;
        if (bias != nullptr) value += E::to_float(bias[first_out + n]);
        out[n] = E::from_float(value);
    }
}

template <class E, int ROWS, int TILES>
void int8_part(const Int8Call &call, int64_t tile, int64_t row) {
    int32_t sums[ROWS * TILES * TILE_OUT];
    const uint8_t *tiles = call.tiles + tile * call.inputs * TILE_OUT;
    int8_sums<ROWS, TILES>(call, tiles, call.values + row * call.inputs, sums);
    for (int r = 0; r < ROWS; ++r)
        int8_store<E>(call, row + r, tile * TILE_OUT, TILES * TILE_OUT, sums + r * TILES * TILE_OUT);
}

// All rows with TILES tiles, which stay near while rows go by.
template <class E, int TILES>
void int8_all_rows(const Int8Call &call, int64_t tile) {
    int64_t row = 0;
    if (TILES <= INT8_TILES)
        for (; row + INT8_ROWS <= call.num_rows; row += INT8_ROWS)
            int8_part<E, TILES <= INT8_TILES ? INT8_ROWS : 1, TILES>(call, tile, row);
    if (row + 4 <= call.num_rows) {
        int8_part<E, 4, TILES>(call, tile, row);
        row += 4;
    }
    if (row + 2 <= call.num_rows) {
        int8_part<E, 2, TILES>(call, tile, row);
        row += 2;
    }
    if (row < call.num_rows) int8_part<E, 1, TILES>(call, tile, row);
}

template <class E>
void int8_tiles(const Int8Call &call, int64_t first, int64_t end) {
    int64_t tile = first;
    if (call.num_rows < INT8_ROWS)
        for (; tile + FEW_ROWS_TILES <= end; tile += FEW_ROWS_TILES) int8_all_rows<E, FEW_ROWS_TILES>(call, tile);
    for (; tile + INT8_TILES <= end; tile += INT8_TILES) int8_all_rows<E, INT8_TILES>(call, tile);
    for (; tile < end; ++tile) int8_all_rows<E, 1>(call, tile);
}

}  // namespace
