"""Rounding that is the same on a GPU and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter cuts the digits that a dtype lacks instead of rounding, and has no NaN in 8 bits.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 `x` as the nearest number of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = _without_digits(x, 16)
    return x.to(dtype)


@triton.jit
def _without_digits(x, NUM: tl.constexpr):
    """Return float32 `x` with the last NUM of its digits rounded away."""
    bits = x.to(tl.int32, bitcast=True)
    half: tl.constexpr = (1 << (NUM - 1)) - 1
    bits = (bits + half + ((bits >> NUM) & 1)) & -(1 << NUM)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def quantized(x, scale, dtype: tl.constexpr):
    """Return float32 x / scale as the nearest number of an 8-bit `dtype`, ties to even.

    What is beyond its largest number becomes that one; a NaN stays a NaN.
    """
    largest: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
    x = tl.div_rn(x, scale)
    x = tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))
    if INTERPRETED:
        digits: tl.constexpr = 3 if dtype == tl.float8e4nv else 2
        least: tl.constexpr = 2.0**-6 if dtype == tl.float8e4nv else 2.0**-14
        # Below the smallest normal number, numbers are this far apart: a sum with so large a
        # number has no smaller digits.
        rounder: tl.constexpr = 1.5 * 2.0**23 * least * 2.0**-digits
        small = (x + rounder) - rounder
        near = tl.where(tl.abs(x) < least, small, _without_digits(x, 23 - digits))
        bits = near.to(dtype).to(tl.uint8, bitcast=True)
        found = tl.where(x != x, 0x7F, bits).to(tl.uint8).to(dtype, bitcast=True)
    else:
        found = x.to(dtype)
    return found


@triton.jit
def widened(x, dtype: tl.constexpr):
    """Return `x`, of 8 bits or of `dtype` already, in `dtype`; nothing is lost."""
    if INTERPRETED and x.dtype.primitive_bitwidth == 8:
        bits = x.to(tl.uint8, bitcast=True) & 0x7F
        nan: tl.constexpr = 0x7F if x.dtype == tl.float8e4nv else 0x7D
        found = tl.where(bits >= nan, float("nan"), x.to(tl.float32)).to(dtype)
    else:
        found = x.to(dtype)
    return found


@triton.jit
def narrowed(q):
    """Return bfloat16 queries as float16 and what to multiply each row's scores by.

    Numbers of 8 bits become float16 in one instruction, and bfloat16 in several. A power of two
    makes a row's largest number about 2 ** 10: of what is smaller no more is lost than bfloat16
    has lost of that one. Other queries stay as they are.
    """
    if q.dtype == tl.bfloat16:
        wide = q.to(tl.float32)
        most = tl.max(tl.abs(wide), 1)
        exponent = tl.maximum((most.to(tl.int32, bitcast=True) >> 23) - 127, -100)
        # The bits of 2 ** (10 - exponent), and of the power that undoes it.
        shrink = ((127 + 10 - exponent) << 23).to(tl.float32, bitcast=True)
        enlarge = ((127 - 10 + exponent) << 23).to(tl.float32, bitcast=True)
        found = (wide * shrink[:, None]).to(tl.float16)
    else:
        found, enlarge = q, tl.full([q.shape[0]], 1.0, dtype=tl.float32)
    return found, enlarge
