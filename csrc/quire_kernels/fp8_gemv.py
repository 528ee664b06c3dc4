"""Products of one row with a matrix in 8 bits, in Triton; the row is so too or as it came.

Numbers are e4m3, or integers, whose sums are exact.

As in `gemv`, a program makes a few outputs and reads their rows of the weight once; the first of
them are on their way while the kernel before ends.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.gemv import _weights
from quire_kernels.overlap import let_next_begin, options, wait_for_previous
from quire_kernels.rounding import rounded


@triton.jit
def _scales_of_row(scales_ptr, groups, count: tl.constexpr, SCALED: tl.constexpr):
    """Return the scales of groups of the row, which are 1 where it has none."""
    if SCALED:
        return tl.load(scales_ptr + groups, mask=groups < count, other=0.0)
    return tl.full(groups.shape, 1.0, tl.float32)


@triton.jit(do_not_specialize=["num_out"], launch_metadata=costs.of_product)
def _fp8_gemv_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    weight_stride,
    num_out,
    SIZE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    INTEGER: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Make OUTPUTS numbers.

    HEIGHT outputs and WIDTH inputs share a scale, or with 0 all inputs of an output. SCALED: the
    row has scales too, one or as many as the weight has beside one another.
    """
    let_next_begin(OVERLAPS)
    rows = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    are_inside = rows < num_out
    columns = tl.arange(0, BLOCK)
    weights = _weights(weight_ptr, rows, are_inside, columns, weight_stride, SIZE)
    if WIDTH == 0:
        row_scales = tl.load(weight_scales_ptr + rows, mask=are_inside, other=0.0)
    wait_for_previous(OVERLAPS)
    if SCALED and WIDTH == 0:
        x_scale = tl.load(x_scales_ptr)
    wide: tl.constexpr = tl.int32 if INTEGER else tl.float32
    sums = tl.zeros((OUTPUTS, BLOCK // 16), wide)
    count: tl.constexpr = (SIZE + WIDTH - 1) // WIDTH if WIDTH > 0 else 1
    for start in tl.static_range(0, SIZE, BLOCK):
        at = start + columns
        if start + BLOCK < SIZE:
            later = _weights(weight_ptr, rows, are_inside, at + BLOCK, weight_stride, SIZE)
        x = tl.load(x_ptr + at, mask=at < SIZE, other=0.0).to(wide)
        products = weights.to(wide) * x[None, :]
        # Sixteen neighbours lie in one thread.
        part = tl.sum(tl.reshape(products, (OUTPUTS, BLOCK // 16, 16)), axis=2)
        if WIDTH > 0:
            groups = (start + tl.arange(0, BLOCK // 16) * 16) // WIDTH
            scales_at = weight_scales_ptr + (rows // HEIGHT)[:, None] * count + groups[None, :]
            inside = are_inside[:, None] & (groups < count)[None, :]
            part *= tl.load(scales_at, mask=inside, other=0.0)
            part *= _scales_of_row(x_scales_ptr, groups, count, SCALED)[None, :]
        sums += part
        if start + BLOCK < SIZE:
            weights = later

    out = tl.sum(sums, axis=1).to(tl.float32)
    if WIDTH == 0:
        # In the order of the tiles of many rows: sums of integers then have the same bits.
        out *= row_scales
        if SCALED:
            out *= x_scale
    if BIASED:
        out += tl.load(bias_ptr + rows, mask=are_inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, rounded(out, out_ptr.dtype.element_ty), mask=are_inside)


@functools.cache
def plan(num_out: int, size: int) -> tuple[int, int, int] | None:
    """Return outputs a program, columns a block and warps; None: not here.

    Blocks are of 2,048 columns, 16 bytes a thread and output.
    """
    if size % 16 or size > 32768:
        return None
    outputs = next(n for n in (8, 4, 2, 1) if n == 1 or num_out >= 264 * n)
    return outputs, min(2048, max(512, triton.next_power_of_2(size))), 4


def serves(x: Tensor, weight: Tensor, block: tuple[int, int] | None) -> bool:
    """Answer whether the kernel takes this product: one row, and a plan."""
    num_out, size = weight.shape
    if x.shape[0] != 1 or not x.is_contiguous() or not weight.is_contiguous():
        return False
    return plan(num_out, size) is not None and (block is None or block[1] % 16 == 0)


def linear(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor | None, Tensor],
    out: Tensor,
    *,
    bias: Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> None:
    """Put `fp8.linear` of one row into `out`; `scales` are those of x and of the weight."""
    num_out, size = weight.shape
    chosen = plan(num_out, size)
    assert chosen is not None, f"no plan for {num_out} outputs of {size}"
    outputs, columns, warps = chosen
    height, width = block or (1, 0)
    _fp8_gemv_kernel[(triton.cdiv(num_out, outputs),)](
        x,
        scales[0],
        weight,
        scales[1],
        bias,
        out,
        weight.stride(0),
        num_out,
        SIZE=size,
        OUTPUTS=outputs,
        BLOCK=columns,
        HEIGHT=height,
        WIDTH=width,
        SCALED=scales[0] is not None,
        BIASED=bias is not None,
        INTEGER=weight.dtype == torch.int8,
        num_warps=warps,
        maxnreg=128,
        **options(),
    )
