"""Tile sizes and split limits of the kernels, by head size and dtype.

Those of heads of 128 in 16 bits were measured on one H100 by tests/benchmarks/gpu_attention.py;
the others are the largest that spill no registers.
"""

from __future__ import annotations

import math

from attrs import evolve, frozen

# Keys from which wider tiles pay.
LONG = 4096


@frozen(kw_only=True)
class Tile:
    """Rows and keys of a tile, and how the compiler spreads its work."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@frozen(kw_only=True)
class Tuning:
    """What `attend` runs with.

    `single` serves sequences with one token, `few` those whose rows fit one small tile, `many`
    the rest, and `long` those of a step in which one has LONG keys. Sequences with one token are
    cut into items of at least `few_chunk` keys until there are `few_per_sm` programs an SM, and of
    at least `chunk` keys until there are `most_per_sm`: a GPU that is filled once may still wait
    for its slowest program.
    """

    single: Tile
    few: Tile
    many: Tile
    long: Tile
    few_per_sm: int = 1
    few_chunk: int = 128
    most_per_sm: int = 1
    chunk: int = 512


def power_of_two(number: int, *, at_least: int = 16) -> int:
    """Return the next power of two; a product of tensor cores has at least 16 of everything."""
    return max(at_least, 1 << math.ceil(math.log2(number)))


def tuning_for(*, group: int, dim: int, itemsize: int) -> Tuning:
    """Return the tiles for `group` query heads a KV head and heads of `dim`, a power of two."""
    rows = power_of_two(group)
    if itemsize == 4:
        # Products in float32 use no tensor cores; larger tiles spill registers.
        num_warps = 4 if rows == 16 else 8
        small = Tile(block_m=rows, block_n=16, num_warps=num_warps, num_stages=2)
        large = Tile(block_m=max(32, rows), block_n=16, num_warps=8, num_stages=2)
        return Tuning(single=small, few=small, many=large, long=large)
    block_n = 64 if dim <= 128 else 32
    single = Tile(block_m=rows, block_n=block_n, num_warps=4, num_stages=4)
    few = Tile(block_m=max(32, rows), block_n=block_n, num_warps=4, num_stages=3)
    many = Tile(block_m=max(128, rows), block_n=block_n, num_warps=8, num_stages=3)
    # One H100, dim 128: 2,048 tokens 94 us with 64 keys and 100 us with 128; 512 tokens behind
    # 32,256 others 594 and 566 us.
    wide = evolve(many, block_n=128) if dim == 128 else many
    return Tuning(single=single, few=few, many=many, long=wide)


def fitted(tuning: Tuning, *, dim: int, itemsize: int, shared_bytes: int) -> Tuning:
    """Return the tuning with as many stages and keys as a program's shared memory holds."""
    tiles = (tuning.single, tuning.few, tuning.many, tuning.long)
    single, few, many, long = (_fitted(tile, dim * itemsize, shared_bytes) for tile in tiles)
    return evolve(tuning, single=single, few=few, many=many, long=long)


def _fitted(tile: Tile, row_bytes: int, shared_bytes: int) -> Tile:
    while _shared_bytes(tile, row_bytes) > shared_bytes:
        if tile.num_stages > 2:
            tile = evolve(tile, num_stages=tile.num_stages - 1)
        elif tile.block_n > 16:
            tile = evolve(tile, block_n=tile.block_n // 2)
        elif tile.num_stages > 1:
            tile = evolve(tile, num_stages=1)
        else:
            break
    return tile


def _shared_bytes(tile: Tile, row_bytes: int) -> int:
    """Return at least what a program holds: its queries, and a key and a value a stage."""
    return row_bytes * (tile.block_m + 2 * tile.block_n * tile.num_stages)
