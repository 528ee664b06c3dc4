"""Tokens in one order, as int64: by value, equals by falling token id, which is below 2**24.

 63                            24 23                  0
[ the value's bits, made monotone | 2**24 - 1 - token id ]
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(value):
    """Return an int32 that grows with the value, which is no NaN."""
    # Adding 0 turns -0 into 0. Below 0, bits of a float grow as it falls.
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of_key(key):
    """Return the value of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def lowest_order_of(value):
    """Return the least order of a token of this value."""
    return key_of(value).to(tl.int64) * 0x1000000


@triton.jit
def order_of(value, token):
    """Return an int64 that grows with the value, and among equals falls with the token id."""
    return lowest_order_of(value) + (0xFFFFFF - token).to(tl.int64)


@triton.jit
def value_of(order):
    """Return the value in an order."""
    return value_of_key((order >> 24).to(tl.int32))
