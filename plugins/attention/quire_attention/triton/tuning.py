"""Tile sizes and split limits of the kernels, by head size and dtype. All from measurements."""

from __future__ import annotations

import math

from attrs import frozen


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
    the rest. Sequences with one token are cut into items of at least `few_chunk` keys until there
    are `few_per_sm` programs an SM, and of at least `chunk` keys until there are `most_per_sm`: a
    GPU that is filled once may still wait for its slowest program.
    """

    single: Tile
    few: Tile
    many: Tile
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
        return Tuning(single=small, few=small, many=large)
    block_n = 64 if dim <= 128 else 32
    single = Tile(block_m=rows, block_n=block_n, num_warps=4, num_stages=4)
    few = Tile(block_m=max(32, rows), block_n=block_n, num_warps=4, num_stages=3)
    many = Tile(block_m=max(128, rows), block_n=block_n, num_warps=8, num_stages=3)
    return Tuning(single=single, few=few, many=many)
