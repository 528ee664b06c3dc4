"""The hyperbolic tangent in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent: a series near 0, where 1 - 2 ** y would lose digits."""
    square = x * x
    series = 0.1333333333 - square * (0.05396825397 - square * 0.02186948854)
    near = x - x * square * (0.3333333333 - square * series)
    size = tl.abs(x)
    power = tl.exp2(size * (-2 * LOG2_E))
    far = (1 - power) / (1 + power)
    return tl.where(size < 0.25, near, tl.where(x < 0, -far, far))
