// Which part of a product of many rows a block makes, and with whom it shares tiles.
//
// A tile is 128 outputs (gated, 64 of each part) of some rows; a unit is 128 of its inputs. Units are in
// a row, tile after tile, and each block takes as many of them as the others, one more or less:
//
//     tiles     |       0       |       1       |       2       |
//     blocks    |    0    |    1    |    2    |    3    |   4   |
//
// A block whose last tile this is writes some rows of it, and adds up what the others left of those: it
// comes to its end as they do. One that goes on to another tile left its sums long before. Tiles of a
// block alone are written at once.
#pragma once

#include "arguments.h"

namespace quire {

// The next unit, of a tile, and how many are left with it.
struct Units {
    int tile, number, left;
};

// The blocks of a tile, [first, end); those before `end_writer` end with it.
struct TileShares {
    int first, end_writer, end;
};

// Blocks take `each` units, the first `longer` of them one more.
struct Shares {
    int blocks, units_of_tile, row_tiles, each, longer;

    Shares(const PackedArguments& a, int tile_rows)
        : blocks(a.blocks),
          units_of_tile((a.in_features + UNIT_IN - 1) / UNIT_IN),
          row_tiles((a.rows + tile_rows - 1) / tile_rows) {
        const int num_out = a.gated ? a.num_out / 2 : a.num_out;
        const int outputs = a.gated ? 64 : 128;
        const int units = (num_out + outputs - 1) / outputs * row_tiles * units_of_tile;
        each = units / blocks;
        longer = units % blocks;
    }

    __device__ __forceinline__ int first_of(int block) const {
        return block * each + min(block, longer);
    }

    __device__ __forceinline__ Units of_block(int block) const {
        const int first = first_of(block);
        return {first / units_of_tile, first % units_of_tile, first_of(block + 1) - first};
    }

    // The shares of a tile that a block has units of.
    __device__ __forceinline__ TileShares of_tile(int tile, int block) const {
        const int begin = tile * units_of_tile, end = begin + units_of_tile;
        int first = block, last = block;
        while (first_of(first) > begin) --first;
        while (first_of(last + 1) < end) ++last;
        return {first, first_of(last + 1) == end ? last + 1 : last, last + 1};
    }

    // Where a block leaves its sums of a tile: it may do so for its first and for its last.
    __device__ __forceinline__ int place_of(const TileShares& of, int block) const {
        return block < of.end_writer ? blocks + block : block;
    }
};

// Where a tile begins, and the outputs that its warps make.
struct ManyPlace {
    int output, row;

    ManyPlace() = default;

    __device__ __forceinline__ ManyPlace(const PackedArguments& a, const Shares& shares, int tile,
                                         int tile_rows)
        : output(tile), row(0) {
        if (shares.row_tiles > 1) {
            output = tile / shares.row_tiles;
            row = tile % shares.row_tiles * tile_rows;
        }
        output *= a.gated ? 64 : 128;
    }

    // The first of 16 outputs, by their number in the tile, and whether there are any.
    __device__ __forceinline__ int first_of(const PackedArguments& a, int tile) const {
        if (!a.gated) return output + tile * TILE_OUT;
        return tile / 4 * (a.num_out / 2) + output + tile % 4 * TILE_OUT;
    }

    __device__ __forceinline__ bool has(const PackedArguments& a, int tile) const {
        return a.gated ? output + tile % 4 * TILE_OUT < a.num_out / 2
                       : output + tile * TILE_OUT < a.num_out;
    }
};

}  // namespace quire
