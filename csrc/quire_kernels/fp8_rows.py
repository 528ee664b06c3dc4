"""Rounding of activations to e4m3 in Triton, alone, after sum and norm, or after SiLU and product.

Where the output is of integers they become these.

A program has a whole row, whose largest number it must know before it rounds the first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from quire_kernels import costs
from quire_kernels.activation import silu
from quire_kernels.overlap import let_next_begin, options, wait_for_previous
from quire_kernels.rounding import rounded

# A longer row does not fit the registers of the one program that rounds it.
MAX_SIZE = 32768
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
# Of float32, below which the inverse of a scale is not finite.
SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def _divided(x, scale):
    """Return x / scale, rounded as IEEE says, at three instructions a number."""
    if INTERPRETED:
        return x / scale
    inverse = tl.div_rn(1.0, scale)
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)


@triton.jit
def _e4m3(x):
    """Return float32 `x` as the nearest number of e4m3, ties to even; beyond 448 is 448."""
    if not INTERPRETED:
        return x.to(tl.float8e4nv)
    # The interpreter cuts digits off, signs of zeros and NaN too. A unit is 2^-9 at least.
    bits = x.to(tl.int32, bitcast=True)
    near = tl.minimum(tl.maximum(x, -448.0), 448.0)
    exponent = tl.maximum((near.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121) - 3
    magic = (exponent << 23).to(tl.float32, bitcast=True) * 12582912.0
    near = tl.abs((near + magic) - magic)
    code = near.to(tl.float8e4nv).to(tl.int8, bitcast=True).to(tl.int32)
    code = tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)
    return code.to(tl.int8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _scale_of(extreme, largest):
    """Return what takes `extreme` to 448, and 1 for 0."""
    scale = tl.maximum(tl.div_rn(tl.minimum(extreme, largest), 448.0), SMALLEST_SCALE)
    return tl.where(extreme > 0.0, scale, 1.0)


@triton.jit
def _int8(x):
    """Return `x` as integers from -127 to 127, and their scale: NaN where x is not finite."""
    magnitude = tl.abs(x)
    is_finite = tl.min((magnitude < float("inf")).to(tl.int32), axis=0) > 0
    magnitude = tl.where(is_finite, magnitude, 0.0)
    extreme = tl.max(magnitude, axis=0)
    scale = tl.maximum(tl.div_rn(extreme, 127.0), SMALLEST_SCALE)
    scale = tl.where(extreme > 0.0, scale, 1.0)
    near = _divided(tl.where(is_finite, x, 0.0), scale)
    # Adding 1.5 * 2^23 rounds to a whole number.
    near = (near + 12582912.0) - 12582912.0
    near = tl.minimum(tl.maximum(near, -127.0), 127.0)
    return near.to(tl.int8), tl.where(is_finite, scale, float("nan"))


@triton.jit
def _normed_sum(x_ptr, residual_ptr, norm_ptr, columns, inside, eps, SIZE: tl.constexpr):
    """Put the sum into x; return its norm, rounded as `ops.add_rms_norm` rounds."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    total = rounded(x + residual, dtype)
    tl.store(x_ptr + columns, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    norm = tl.load(norm_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return rounded(rounded(wide * scale, dtype).to(tl.float32) * norm, dtype).to(tl.float32)


@triton.jit
def _gated(x_ptr, columns, inside, SIZE: tl.constexpr):
    """Return silu of the first half times the second, rounded as `ops.silu_mul` rounds."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    gate = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    return rounded(rounded(silu(gate), dtype).to(tl.float32) * up, dtype).to(tl.float32)


@triton.jit(launch_metadata=costs.of_rounding)
def _quantize_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    given_ptr,
    values_ptr,
    scales_ptr,
    x_stride,
    residual_stride,
    eps,
    largest,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SOURCE: tl.constexpr,
    GIVEN: tl.constexpr,
    INTEGER: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Round a row. SOURCE: "plain", "norm" of the sum with the residual, or "gate".

    GROUP: inputs that share a scale, or 0: the row does. GIVEN: with the scale that is there.
    """
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    x_ptr += row * x_stride
    if SOURCE == "norm":
        residual_ptr += row * residual_stride
        x = _normed_sum(x_ptr, residual_ptr, norm_ptr, columns, inside, eps, SIZE)
    elif SOURCE == "gate":
        x = _gated(x_ptr, columns, inside, SIZE)
    else:
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if GROUP > 0:
        x = tl.reshape(x, (BLOCK // GROUP, GROUP))
        scales = _scale_of(tl.max(tl.abs(x), axis=1), largest)
        groups = tl.arange(0, BLOCK // GROUP)
        count: tl.constexpr = (SIZE + GROUP - 1) // GROUP
        tl.store(scales_ptr + row * count + groups, scales, mask=groups < count)
        values = tl.reshape(_e4m3(_divided(x, scales[:, None])), (BLOCK,))
    elif INTEGER:
        values, scale = _int8(x)
        tl.store(scales_ptr + row, scale)
    elif GIVEN:
        values = _e4m3(_divided(x, tl.load(given_ptr)))
    else:
        scale = _scale_of(tl.max(tl.abs(x), axis=0), largest)
        tl.store(scales_ptr + row, scale)
        values = _e4m3(_divided(x, scale))
    tl.store(values_ptr + row * SIZE + columns, values, mask=inside)


def serves(x: Tensor, size: int, group: int | None) -> bool:
    """Answer whether a kernel here rounds rows of `size` numbers in such groups."""
    is_power = group is None or (group > 1 and group & (group - 1) == 0)
    return is_power and 0 < size <= MAX_SIZE and x.stride(-1) == 1


def _resources(block: int, num_rows: int) -> dict[str, int | None]:
    """Return warps and registers of the programs of so many rows.

    A GPU that is full wants two programs an SM, one that is not wants short ones. One H200, SiLU of
    14,336: 8,192 rows 208 us with 16 warps, 185 with 32, 162 with 16 of 64 registers; 256 rows 7.4
    and 6.1 us with 16 warps and with 32 of 40 registers.
    """
    if block < 8192 or block > 16384:
        return {"num_warps": min(32, max(1, block // 256)), "maxnreg": None}
    if num_rows == 1:
        # So a step of one sequence was measured; 32 warps are 0.7 us faster alone.
        return {"num_warps": 16, "maxnreg": None}
    return {"num_warps": 16, "maxnreg": 64} if num_rows > 512 else {"num_warps": 32, "maxnreg": 40}


def quantize(
    x: Tensor,
    out: tuple[Tensor, Tensor],
    *,
    group: int | None = None,
    largest: float | None = None,
    given: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gated: bool = False,
) -> None:
    """Round the rows of `x` into `out`, values and scales; `given` is a scale for all of them.

    Values are e4m3, or int8, of which rows have a scale each that nobody gives.

    `norm` is a residual, the weight and epsilon of the norm of its sum with x, which replaces x.
    """
    values, scales = out
    num_rows, size = values.shape
    if num_rows == 0:
        return
    assert values.dtype != torch.int8 or (group is None and given is None and largest is None)
    residual, weight, eps = norm or (x, x, 0.0)
    block = max(triton.next_power_of_2(size), group or 1)
    _quantize_kernel[(num_rows,)](
        x,
        residual,
        weight,
        scales if given is None else given,
        values,
        scales,
        x.stride(0),
        residual.stride(0),
        eps,
        float("inf") if largest is None else largest,
        SIZE=size,
        BLOCK=block,
        GROUP=0 if given is not None else min(group or 0, block),
        SOURCE="norm" if norm else "gate" if gated else "plain",
        GIVEN=given is not None,
        INTEGER=values.dtype == torch.int8,
        **_resources(block, num_rows),
        **options(),
    )
