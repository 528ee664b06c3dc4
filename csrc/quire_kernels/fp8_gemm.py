"""Products of rows in 8 bits with a matrix in 8 bits on tensor cores, in Triton.

Numbers are e4m3, or integers, whose sums are exact.

A program makes a tile of outputs of some rows from a part of the columns. The weight is the left
factor, so that few rows fill the tensor cores, too. Where a tile has several parts, the program
that ends last adds their sums up in order: a product is the same number every time.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from quire_kernels import costs
from quire_kernels.overlap import let_next_begin, options, prefetch, wait_for_previous
from quire_kernels.parts import counters, sum_of_parts
from quire_kernels.rounding import rounded

# Tiles of a large GPU, one an SM; of half as many and fewer columns are cut.
_TILES = 132
# Above it tiles of 64 outputs are more than an H200 has room for.
WIDE_OUT = 8448
# So many of the largest tiles of integers give all SMs enough to do.
FULL_TILES = 224
_DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _place(
    tile, num_rows, num_out, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPED: tl.constexpr
):
    """Return which outputs and rows a program makes: those of GROUPED tiles of rows in turn."""
    row_tiles, span = tl.cdiv(num_rows, ROWS), GROUPED * tl.cdiv(num_out, OUTPUTS)
    first = tile // span * GROUPED
    height = tl.minimum(row_tiles - first, GROUPED)
    return tile % span // height, first + tile % span % height


@triton.jit
def _added(sums, weights, x, BLOCK: tl.constexpr, INTEGER: tl.constexpr, PRECISE: tl.constexpr):
    """Add the products of a block: integers exactly, and floats as precisely as is asked for."""
    # Not by returns: the compiler reads on behind one that is taken.
    if INTEGER:
        sums = tl.dot(weights, x, sums, out_dtype=tl.int32)
    elif PRECISE:
        sums = tl.dot(weights, x, sums, max_num_imprecise_acc=BLOCK)
    else:
        sums = tl.dot(weights, x, sums)
    return sums


@triton.jit(do_not_specialize=["num_rows"], launch_metadata=costs.of_rows_product)
def _fp8_gemm_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    part_ptr,
    counts_ptr,
    x_stride,
    weight_stride,
    num_rows,
    num_out,
    size,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPED: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BIASED: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    INTEGER: tl.constexpr,
    PRECISE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Make a tile of [OUTPUTS, ROWS], or the sums of a part of its columns.

    HEIGHT: so many outputs and BLOCK inputs share a scale, and BLOCK inputs of a row; with 0 all
    inputs of an output and of a row do, ONE_SCALE: of all rows. GROUPED: tiles of so many rows
    go over the outputs together, so that both stay in the L2. PRECISE: what a block
    sums is added in float32; the tensor cores themselves keep some 14 bits.
    """
    let_next_begin(OVERLAPS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tile, part = tl.program_id(0), tl.program_id(1)
    output_tile, row_tile = _place(tile, num_rows, num_out, ROWS, OUTPUTS, GROUPED)
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    # Outputs beyond the last are computed of its weights, and not stored. Rows beyond the last are
    # zeros: were they read of the last one, all programs would want the same line of the L2 at once
    # (96 rows x 28672: 57 us instead of the 40 of 128 rows, one H200).
    weight_rows = tl.minimum(outputs, num_out - 1).to(tl.int64)
    x_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    are_rows = (rows < num_rows)[None, :]
    num_blocks = size // BLOCK
    first = part * num_blocks // PARTS
    last = (part + 1) * num_blocks // PARTS
    if PREFETCH > 0:
        prefetch(weight_ptr + weight_rows * weight_stride + first * BLOCK, PREFETCH)
    if HEIGHT > 0:
        weight_scales_ptr += (output_tile * OUTPUTS // HEIGHT).to(tl.int64) * num_blocks
        x_scales_at = x_scales_ptr + x_rows * num_blocks
    wait_for_previous(OVERLAPS)
    columns = first * BLOCK + tl.arange(0, BLOCK)
    weight_at = weight_ptr + weight_rows[:, None] * weight_stride + columns[None, :]
    x_at = x_ptr + x_rows[None, :] * x_stride + columns[:, None]
    sums = tl.zeros((OUTPUTS, ROWS), tl.int32 if INTEGER else tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        weights, x = tl.load(weight_at), tl.load(x_at, mask=are_rows, other=0.0)
        if HEIGHT > 0:
            scales = tl.load(weight_scales_ptr + block) * tl.load(x_scales_at + block)
            sums += tl.dot(weights, x) * scales[None, :]
        else:
            sums = _added(sums, weights, x, BLOCK, INTEGER, PRECISE)
        weight_at += BLOCK
        x_at += BLOCK

    inside = (outputs < num_out)[:, None] & are_rows
    if PARTS > 1:
        at = rows.to(tl.int64)[None, :] * num_out + outputs[:, None]
        stride = num_rows.to(tl.int64) * num_out
        tl.store(part_ptr + part * stride + at, sums, mask=inside)
        tl.debug_barrier()
        came = tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel")
        if came < PARTS - 1:
            return
        tl.store(counts_ptr + tile, 0)
        sums = sum_of_parts(part_ptr, at, inside, PARTS, stride)
    sums = sums.to(tl.float32)
    if HEIGHT == 0:
        sums *= tl.load(weight_scales_ptr + weight_rows)[:, None]
        sums *= tl.load(x_scales_ptr + (x_rows * 0 if ONE_SCALE else x_rows))[None, :]
    if BIASED:
        bias = tl.load(bias_ptr + outputs, mask=outputs < num_out, other=0.0)
        sums += bias.to(tl.float32)[:, None]
    out_at = out_ptr + rows.to(tl.int64)[None, :] * num_out + outputs[:, None]
    tl.store(out_at, rounded(sums, dtype), mask=inside)


@frozen
class Plan:
    """How a product is cut: rows and outputs a tile, columns a block, parts of the columns."""

    rows: int
    outputs: int
    block: int
    parts: int
    stages: int
    warps: int = 4
    grouped: int = 1
    prefetch: int = 1024


@functools.cache
def plan(
    num_rows: int,
    num_out: int,
    size: int,
    *,
    block: tuple[int, int] | None = None,
    is_integer: bool = False,
) -> Plan | None:
    """Return how to cut a product of `num_rows`, a power of two; None: not here."""
    width = block[1] if block else 256 if size % 256 == 0 else 128
    if size % width or width not in (32, 64, 128, 256) or num_out < 64:
        return None
    if block is not None and block[0] % 64:
        return None
    if block is not None and num_rows >= 64:
        outputs = 128 if block[0] % 128 == 0 else 64
        return Plan(64, outputs, width, 1, 4, grouped=8, prefetch=0)
    # 2048 rows x 14336 -> 4096 in integers: 216 us against 367 of smaller tiles, one H200.
    if is_integer and num_rows // 256 * triton.cdiv(num_out, 128) >= FULL_TILES:
        return Plan(256, 128, 128, 1, 3, warps=8, grouped=4)
    if num_rows > 128:
        if num_out <= WIDE_OUT // 2:
            return Plan(128, 64, 128, 1, 6, grouped=2)
        return Plan(128, 128, 128, 1, 4, warps=8, grouped=2)
    tiles = triton.cdiv(num_out, 64)
    if num_rows == 64 and tiles > _TILES:
        return Plan(num_rows, 64, 128, 1, 6)
    parts = max(1, min(8, _TILES // tiles, size // (2 * width)))
    return Plan(num_rows, 64, width, parts, 4)


def padded(num_rows: int) -> int:
    """Return the power of two that plans are made for."""
    return min(8192, max(16, triton.next_power_of_2(num_rows)))


def few_rows(num_out: int) -> int:
    """Return how many rows are few: `_scaled_mm` cuts no columns, and leaves SMs without work."""
    return 256 if num_out <= WIDE_OUT else 64


def serves(x: Tensor, weight: Tensor, dtype: torch.dtype, block: tuple[int, int] | None) -> bool:
    """Answer whether the kernel takes this product: dense rows and weight, and a plan.

    Of many rows in e4m3 without blocks `torch._scaled_mm` makes bfloat16 faster.
    """
    num_rows, (num_out, size) = x.shape[0], weight.shape
    if not x.is_contiguous() or not weight.is_contiguous() or dtype not in _DTYPES:
        return False
    is_e4m3 = weight.dtype != torch.int8
    if is_e4m3 and block is None and dtype == torch.bfloat16 and num_rows > few_rows(num_out):
        return False
    found = plan(padded(num_rows), num_out, size, block=block, is_integer=not is_e4m3)
    return num_rows > 0 and found is not None


def linear(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    bias: Tensor | None = None,
    block: tuple[int, int] | None = None,
    chosen: Plan | None = None,
) -> None:
    """Put `fp8.linear` of some rows into `out`; `scales` are those of x and of the weight."""
    (num_rows, size), num_out = x.shape, weight.shape[0]
    is_integer = weight.dtype == torch.int8
    chosen = chosen or plan(padded(num_rows), num_out, size, block=block, is_integer=is_integer)
    assert chosen is not None, f"no plan for {num_rows} rows, {num_out} outputs of {size}"
    part, counts = out, out
    if chosen.parts > 1:
        shape = (chosen.parts, num_rows, num_out)
        part = x.new_empty(shape, dtype=torch.int32 if is_integer else torch.float32)
        counts = counters(x.device, weight.data_ptr())
    tiles = triton.cdiv(num_out, chosen.outputs) * triton.cdiv(num_rows, chosen.rows)
    _fp8_gemm_kernel[(tiles, chosen.parts)](
        x,
        scales[0],
        weight,
        scales[1],
        bias,
        out,
        part,
        counts,
        x.stride(0),
        weight.stride(0),
        num_rows,
        num_out,
        size,
        ROWS=chosen.rows,
        OUTPUTS=chosen.outputs,
        BLOCK=chosen.block,
        HEIGHT=block[0] if block else 0,
        PARTS=chosen.parts,
        GROUPED=chosen.grouped,
        ONE_SCALE=block is None and scales[0].numel() == 1,
        BIASED=bias is not None,
        STAGES=chosen.stages,
        PREFETCH=min(chosen.prefetch, size // chosen.parts) if options()["OVERLAPS"] else 0,
        INTEGER=is_integer,
        PRECISE=chosen.rows <= 64 or out.dtype == torch.float16,
        num_warps=chosen.warps,
        **options(),
    )
