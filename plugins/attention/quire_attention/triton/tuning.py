"""Tile sizes and split limits of the kernels, by head size and dtype.

Those of heads of 128 in 16 bits were measured on one H200 by tests/benchmarks/gpu_attention.py;
the others are the largest that spill no registers.
"""

from __future__ import annotations

import math

from attrs import evolve, frozen


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

    `single` serves sequences with one token, and `crowd` those that fill the GPU several times;
    `few` serves sequences whose rows fit one small tile, and `many` the rest. Sequences with one
    token are cut into items of at least `few_chunk` keys until there are `few_per_sm` programs an
    SM, and of at least `chunk` keys until there are `most_per_sm`: a GPU that is filled once may
    still wait for its slowest program.
    """

    single: Tile
    crowd: Tile
    few: Tile
    many: Tile
    few_per_sm: int = 2
    few_chunk: int = 64
    most_per_sm: int = 4
    chunk: int = 1024
    crowd_per_sm: int = 6


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
        return Tuning(single=small, crowd=small, few=small, many=large)
    block_n = 64 if dim <= 128 else 32
    single = Tile(block_m=rows, block_n=block_n, num_warps=4, num_stages=4)
    few = Tile(block_m=max(32, rows), block_n=block_n, num_warps=4, num_stages=3)
    many = Tile(block_m=max(128, rows), block_n=block_n, num_warps=8, num_stages=3)
    # One H200, dim 128: 128 sequences of 1,000 tokens 134 us with four stages, which leave an SM
    # one program, and 128 us with three; 64 of 4,096 253 and 301 us.
    crowd = evolve(single, num_stages=3) if dim == 128 else single
    return Tuning(single=single, crowd=crowd, few=few, many=many)


def latent_tuning(*, group: int, itemsize: int) -> Tuning:
    """Return the tiles for programs of `group` heads over latents of some hundred numbers."""
    rows = power_of_two(group)
    if itemsize == 4:
        wide = Tile(block_m=rows, block_n=16, num_warps=8, num_stages=1)
        return Tuning(single=wide, crowd=wide, few=wide, many=wide)
    many = Tile(block_m=64, block_n=16, num_warps=8, num_stages=3)
    small = {16: Tile(block_m=16, block_n=32, num_warps=4, num_stages=3)}
    small[32] = Tile(block_m=32, block_n=32, num_warps=8, num_stages=2)
    single = small.get(rows, many)
    return Tuning(single=single, crowd=single, few=single, many=many)


# More keys than a sequence has: it is never split.
UNSPLIT = 1 << 30


def invariant(tuning: Tuning) -> Tuning:
    """Return one tile for all rows, and no splits: what a row is summed with is its own affair."""
    tile = tuning.few
    return evolve(tuning, single=tile, crowd=tile, many=tile, few_chunk=UNSPLIT, chunk=UNSPLIT)


def fitted(
    tuning: Tuning, *, dim: int, itemsize: int, shared_bytes: int, rows_a_key: int = 2
) -> Tuning:
    """Return the tuning with as many stages and keys as a program's shared memory holds.

    `rows_a_key` rows of `dim` are read of each: a key and a value, or a latent that is both.
    """
    tiles = (tuning.single, tuning.crowd, tuning.few, tuning.many)
    single, crowd, few, many = (
        _fitted(tile, dim * itemsize, shared_bytes, rows_a_key) for tile in tiles
    )
    return evolve(tuning, single=single, crowd=crowd, few=few, many=many)


def _fitted(tile: Tile, row_bytes: int, shared_bytes: int, rows_a_key: int) -> Tile:
    while _shared_bytes(tile, row_bytes, rows_a_key) > shared_bytes:
        if tile.num_stages > 2:
            tile = evolve(tile, num_stages=tile.num_stages - 1)
        elif tile.block_n > 16:
            tile = evolve(tile, block_n=tile.block_n // 2)
        elif tile.num_stages > 1:
            tile = evolve(tile, num_stages=1)
        else:
            break
    return tile


def _shared_bytes(tile: Tile, row_bytes: int, rows_a_key: int) -> int:
    """Return at least what a program holds: its queries, and the rows of a tile of keys a stage."""
    return row_bytes * (tile.block_m + rows_a_key * tile.block_n * tile.num_stages)
