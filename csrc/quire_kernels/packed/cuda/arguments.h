// What the entry points take: one struct a call. The Python side declares the same fields.
#pragma once

#include <cstdint>

namespace quire {

constexpr int BFLOAT16 = 0;
constexpr int FLOAT16 = 1;

// Outputs and inputs of a tile, and the bytes of its codes: see layout.py.
constexpr int TILE_OUT = 16;
constexpr int TILE_IN = 64;
constexpr int TILE_BYTES = TILE_OUT * TILE_IN / 2;
// Inputs of a unit of `many_rows`.
constexpr int UNIT_IN = 2 * TILE_IN;

struct PackedArguments {
    // x, residual, total [rows, in_features], out [rows, num_out]; rows may be strided.
    const void* x;
    // Null where there is no norm; `total` is written then.
    const void* residual;
    const void* norm;
    void* total;
    // Tiles [num_out / 16, in_features / 64] of 512 bytes.
    const uint8_t* tiles;
    // Float16 [groups, num_out] and uint8 [groups, num_out / 2], rows strided.
    const uint16_t* scales;
    const uint8_t* zeros;
    // [num_out] or null.
    const void* bias;
    void* out;
    // Sums of tiles that blocks share, for each block those of two tiles; and how many blocks of a tile
    // have stored theirs and gone: zeros before and after.
    float* partial;
    int32_t* arrived;
    // Strides in elements, of zeros in bytes.
    int64_t x_stride;
    int64_t residual_stride;
    int64_t out_stride;
    int64_t scale_stride;
    int64_t zero_stride;
    int32_t rows;
    int32_t num_out;
    int32_t in_features;
    // Inputs of a group as a power of two; 31: all of them.
    int32_t group_shift;
    int32_t dtype;
    // The second half of the outputs is multiplied with silu of the first.
    int32_t gated;
    // Whether bfloat16 holds all scales.
    int32_t has_short_scales;
    // Rows of a block's tile, and the blocks. Where they share tiles all of them are on the GPU at the
    // same time.
    int32_t tile_rows;
    int32_t blocks;
    int32_t num_sms;
    float eps;
};

}  // namespace quire
