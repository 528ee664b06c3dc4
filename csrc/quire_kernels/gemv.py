"""Products of one row with a matrix, in Triton, alone or with the norm before and SiLU after.

A program makes a few outputs: it reads their rows of the weight once, and the input from the L2.

    weight [num_out, size]     program 0  | row 0 ..................... |   sums in float32,
                                          | row 1 ..................... |   reduced once at the end
                               program 1  | row 2 ..................... |
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.activation import silu
from quire_kernels.overlap import let_next_begin, options, wait_for_previous
from quire_kernels.rounding import rounded

_DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _added(x_ptr, residual_ptr, columns, SIZE: tl.constexpr):
    """Return the sum of a block of the input and the residual, rounded."""
    inside = columns < SIZE
    x = tl.load(x_ptr + columns, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + columns, mask=inside, other=0.0)
    return rounded(x.to(tl.float32) + residual.to(tl.float32), x.dtype)


@triton.jit
def _scale_of_norm(x_ptr, residual_ptr, total_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return what the sum is multiplied with to norm it; the first program stores the sum."""
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        total = _added(x_ptr, residual_ptr, columns, SIZE)
        if tl.program_id(0) == 0:
            tl.store(total_ptr + columns, total, mask=columns < SIZE)
        squares += total.to(tl.float32) * total.to(tl.float32)
    return tl.rsqrt(tl.sum(squares, axis=0) / SIZE + eps)


@triton.jit
def _normed(x_ptr, residual_ptr, norm_ptr, columns, scale, SIZE: tl.constexpr):
    """Return a block of the normed sum, rounded as `ops.rms_norm` rounds."""
    total = _added(x_ptr, residual_ptr, columns, SIZE)
    norm = tl.load(norm_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    normed = rounded(total.to(tl.float32) * scale, total.dtype).to(tl.float32)
    return rounded(normed * norm, total.dtype)


@triton.jit
def _weights(weight_ptr, rows, are_inside, columns, stride, SIZE: tl.constexpr):
    """Load a block of some rows of the weight; nobody reads it again in this step."""
    at = weight_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = are_inside[:, None] & (columns < SIZE)[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_out"], launch_metadata=costs.of_product)
def _gemv_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    total_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    weight_stride,
    num_out,
    eps,
    SIZE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Make OUTPUTS numbers.

    NORMS: of the normed sum of input and residual. GATED: each of two rows of the weight, its
    gate's and, `num_out` further, its up's; these lie beside one another in what is computed.
    """
    let_next_begin(OVERLAPS)
    parts: tl.constexpr = 2 if GATED else 1
    first = tl.program_id(0) * OUTPUTS
    places = tl.arange(0, OUTPUTS * parts)
    rows = first + places // parts + places % parts * num_out
    are_inside = first + places // parts < num_out
    columns = tl.arange(0, BLOCK)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    # The weights of the first block are on their way while the kernel before ends and the norm is
    # computed, and those of the next one while a block is multiplied.
    weights = _weights(weight_ptr, rows, are_inside, columns, weight_stride, SIZE)
    wait_for_previous(OVERLAPS)
    if NORMS:
        # Loads do not move across a barrier; the compiler would put the norm's first.
        tl.debug_barrier()
        scale = _scale_of_norm(x_ptr, residual_ptr, total_ptr, eps, SIZE, BLOCK)
    sums = tl.zeros((OUTPUTS * parts, BLOCK // 8), tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        at = start + columns
        if start + BLOCK < SIZE:
            later = _weights(weight_ptr, rows, are_inside, at + BLOCK, weight_stride, SIZE)
        if NORMS:
            x = _normed(x_ptr, residual_ptr, norm_ptr, at, scale, SIZE)
        else:
            x = tl.load(x_ptr + at, mask=at < SIZE, other=0.0)
        products = weights.to(tl.float32) * x.to(tl.float32)[None, :]
        # Eight neighbours lie in one thread.
        sums += tl.sum(tl.reshape(products, (OUTPUTS * parts, BLOCK // 8, 8)), axis=2)
        if start + BLOCK < SIZE:
            weights = later

    out = tl.sum(sums, axis=1)
    if BIASED:
        out += tl.load(bias_ptr + rows, mask=are_inside, other=0.0).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.reshape(rounded(out, dtype).to(tl.float32), (OUTPUTS, 2)))
        out = rounded(silu(gate), dtype).to(tl.float32) * up
    outputs = first + tl.arange(0, OUTPUTS)
    tl.store(out_ptr + outputs, rounded(out, dtype), mask=outputs < num_out)


@functools.cache
def plan(num_out: int, size: int, *, gated: bool = False) -> tuple[int, int, int] | None:
    """Return outputs a program, columns a block and warps; None where cuBLAS is to be taken.

    Taken is what gives every multiprocessor of a large GPU two programs or more, up to sizes at
    which cuBLAS reaches the memory's speed too. One H100, bfloat16, us here and in cuBLAS:
    4096 x 1024 3.9 and 5.9, 1024 x 3072 3.3 and 7.7, 4096 x 4096 12.3 and 16.5, 4096 x 14336
    40.6 and 44.4.
    """
    if num_out < 256 or num_out > 16384 or size % 8 or size > 16384:
        return None
    outputs = next(n for n in (8, 4, 2, 1) if n == 1 or num_out >= 264 * n)
    if gated and outputs > 1:
        outputs //= 2
    return outputs, min(1024, max(256, triton.next_power_of_2(size))), 4


def serves(x: Tensor, weight: Tensor, *, gated: bool = False) -> bool:
    """Answer whether a kernel here takes this product: one row, 16 bits, and a plan."""
    num_out, size = weight.shape
    if x.numel() != size or weight.dtype not in _DTYPES or weight.stride(1) != 1:
        return False
    return plan(num_out // 2 if gated else num_out, size, gated=gated) is not None


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the product, [1, num_out], and the sum of x and the residual if there is a norm."""
    num_out, size = weight.shape
    num_out = num_out // 2 if gated else num_out
    chosen = plan(num_out, size, gated=gated)
    assert chosen is not None, f"no plan for {num_out} outputs of {size}"
    outputs, block, warps = chosen
    out = torch.empty((1, num_out), dtype=x.dtype, device=x.device)
    residual, norm_weight, eps = norm or (x, x, 0.0)
    total = torch.empty_like(x) if norm else x
    _gemv_kernel[(triton.cdiv(num_out, outputs),)](
        x,
        residual,
        norm_weight,
        total,
        weight,
        bias,
        out,
        weight.stride(0),
        num_out,
        eps,
        SIZE=size,
        OUTPUTS=outputs,
        BLOCK=block,
        NORMS=norm is not None,
        GATED=gated,
        BIASED=bias is not None,
        num_warps=warps,
        **options(),
    )
    return out, total


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `ops.linear` of one row."""
    return _launch(x, weight, bias)[0]


def add_rms_norm_linear(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `ops.add_rms_norm_linear` of one row; the sum is in new memory."""
    return _launch(x, weight, bias, norm=(residual, norm_weight, eps))


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """Return `ops.linear_silu_mul` of one row."""
    return _launch(x, weight, gated=True)[0]


def add_rms_norm_linear_silu_mul(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `ops.add_rms_norm_linear_silu_mul` of one row; the sum is in new memory."""
    return _launch(x, weight, norm=(residual, norm_weight, eps), gated=True)
