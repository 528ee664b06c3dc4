"""Rounding that is the same on a GPU and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter cuts the digits that bfloat16 lacks instead of rounding.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 `x` as the nearest number of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
