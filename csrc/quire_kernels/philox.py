"""Philox4x32-10 in PyTorch: random numbers as a function of a counter and a seed."""

from __future__ import annotations

from torch import Tensor

_MASK32 = 0xFFFFFFFF
_PHILOX_ROUND_A, _PHILOX_ROUND_B = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEY_A, _PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85


def _multiply_32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a product of 32-bit numbers held in int64."""
    # The 64-bit product may wrap to a negative number; its bits are right all the same.
    product = a * b
    return (product >> 32) & _MASK32, product & _MASK32


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Return the four 32-bit lanes of Philox4x32-10 as int64 tensors in [0, 2**32).

    The counter's words and the 64-bit `seed` are int64 tensors that broadcast together.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = (word & _MASK32 for word in counter)
    key_a, key_b = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        high_a, low_a = _multiply_32(c0, _PHILOX_ROUND_A)
        high_b, low_b = _multiply_32(c2, _PHILOX_ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a = (key_a + _PHILOX_KEY_A) & _MASK32
        key_b = (key_b + _PHILOX_KEY_B) & _MASK32
    return [c0, c1, c2, c3]
