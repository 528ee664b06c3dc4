"""Products of a few rows with a matrix on tensor cores, in Triton, alone or with SiLU after.

Memory is the limit: a weight is read once, by programs that each make a tile of outputs for all
rows, from a part of the columns. Where a tile has several parts, the program that ends last adds
up their sums in order, so that a product is the same number every time.

    weight [num_out, size]      part 0     part 1
                       tile 0 | program 0 | program 2 |
                       tile 1 | program 1 | program 3 |
"""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from attrs import evolve, frozen
from torch import Tensor

from quire_kernels import costs
from quire_kernels.activation import silu
from quire_kernels.overlap import let_next_begin, options, prefetch, wait_for_previous
from quire_kernels.parts import MAX_TILES, counters, sum_of_parts
from quire_kernels.rounding import rounded

_DTYPES = (torch.bfloat16, torch.float16)
# Beyond so many rows cuBLAS, which shares tiles between multiprocessors, is as fast.
MAX_ROWS = 128


@triton.jit
def _leave(part_ptr, at, inside, sums, up_sums, whole, GATED: tl.constexpr):
    """Store what a program has of its tile."""
    tl.store(part_ptr + at, sums, mask=inside)
    if GATED:
        tl.store(part_ptr + whole + at, up_sums, mask=inside)


@triton.jit(do_not_specialize=["num_rows"], launch_metadata=costs.of_product)
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
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
    IS_SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Make OUTPUTS numbers of each of at most ROWS rows, or the sums of a part of their columns.

    GATED: `num_out` further lie the weights of the up projection.
    """
    let_next_begin(OVERLAPS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    # Programs that read the same weights are neighbours.
    row_tiles = tl.cdiv(num_rows, ROWS)
    pid = tl.program_id(0)
    tile = pid // row_tiles
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    # Outputs that lie outside are computed of the last one, and not stored.
    weight_rows = tl.minimum(outputs, num_out - 1).to(tl.int64)
    is_row = (rows < num_rows)[:, None]
    num_blocks = size // BLOCK
    first = part * num_blocks // num_parts
    last = (part + 1) * num_blocks // num_parts
    if PREFETCH > 0:
        prefetch(weight_ptr + weight_rows * weight_stride + first * BLOCK, PREFETCH)
        if GATED:
            up_rows = weight_rows + num_out
            prefetch(weight_ptr + up_rows * weight_stride + first * BLOCK, PREFETCH)
    wait_for_previous(OVERLAPS)
    columns = first * BLOCK + tl.arange(0, BLOCK)
    weight_at = weight_ptr + weight_rows[:, None] * weight_stride + columns[None, :]
    up_at = weight_at + num_out.to(tl.int64) * weight_stride
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    up_sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for _ in tl.range(first, last, num_stages=STAGES):
        x = tl.trans(tl.load(x_at, mask=is_row, other=0.0))
        sums = tl.dot(tl.load(weight_at, eviction_policy="evict_first"), x, sums)
        if GATED:
            up_sums = tl.dot(tl.load(up_at, eviction_policy="evict_first"), x, up_sums)
            up_at += BLOCK
        weight_at += BLOCK
        x_at += BLOCK

    inside = (outputs < num_out)[:, None] & (rows < num_rows)[None, :]
    if IS_SPLIT:
        whole = num_out.to(tl.int64) * num_rows
        at = outputs.to(tl.int64)[:, None] * num_rows + rows[None, :]
        kinds: tl.constexpr = 2 if GATED else 1
        _leave(part_ptr + part * kinds * whole, at, inside, sums, up_sums, whole, GATED)
        tl.debug_barrier()
        came = tl.atomic_add(counts_ptr + pid, 1, sem="acq_rel")
        if came < num_parts - 1:
            return
        tl.store(counts_ptr + pid, 0)
        sums = sum_of_parts(part_ptr, at, inside, num_parts, kinds * whole)
        if GATED:
            up_sums = sum_of_parts(part_ptr + whole, at, inside, num_parts, kinds * whole)
    if BIASED:
        bias = tl.load(bias_ptr + outputs, mask=outputs < num_out, other=0.0)
        sums += bias.to(tl.float32)[:, None]
    out = rounded(sums, dtype)
    if GATED:
        gate = rounded(silu(out.to(tl.float32)), dtype).to(tl.float32)
        out = rounded(gate * rounded(up_sums, dtype).to(tl.float32), dtype)
    out_at = out_ptr + rows.to(tl.int64)[None, :] * num_out + outputs[:, None]
    tl.store(out_at, out, mask=inside)


@frozen
class Plan:
    """How a product is cut: rows and outputs a tile, columns a block, parts of the columns.

    `prefetch` is how many bytes of each weight row are asked for while the kernel before ends.
    """

    rows: int
    outputs: int
    block: int
    parts: int
    stages: int
    warps: int = 4
    prefetch: int = 0


@functools.cache
def plan(num_rows: int, num_out: int, size: int, *, gated: bool = False) -> Plan | None:
    """Return how to cut a product; None where cuBLAS is to be taken.

    Taken is what was faster on one H200, in bfloat16; us here and in cuBLAS: 4096 x 4096 10.9 and
    13.8 for 16 rows; gated 14336 x 4096 57.8 and 59.4 for 16 rows, 67.2 and 72.3 for 128; gated
    3072 x 1024 6.1 and 7.9 for 16 rows, 9.6 and 8.2 for 128.
    """
    tiles = triton.cdiv(num_out, 64)
    if size % 128 or size < 512 or num_out < 256 or tiles > MAX_TILES // 2:
        return None
    fetch = 512 if num_rows == 16 else 0
    if gated:
        if num_rows <= 32 or (num_rows == 64 and tiles > 132):
            return Plan(num_rows, 64, 128, 1, 4, prefetch=fetch)
        if num_rows == 64:
            return Plan(64, 64, 64, 1, 6)
        return Plan(128, 128, 64, 1, 4, warps=8) if tiles > 198 else None
    if num_rows > 64 or (num_rows == 64 and size < 8192) or (num_rows == 32 and tiles < 32):
        return None
    is_deep = size > 8192 or (tiles < 32 and size > 2048)
    parts = max(1, min(8, 132 // tiles)) if is_deep else 1
    return Plan(num_rows, 64, 128, parts, 6 if num_rows < 64 else 5, prefetch=fetch)


def padded(num_rows: int) -> int:
    """Return the rows of the smallest tile that holds so many: 16, 32, 64 or 128."""
    return max(16, 1 << (num_rows - 1).bit_length())


def serves(x: Tensor, weight: Tensor, *, gated: bool = False) -> bool:
    """Answer whether a kernel here takes this product: some rows, 16 bits, and a plan."""
    num_out, size = weight.shape
    if not 1 < x.shape[0] <= MAX_ROWS or weight.dtype not in _DTYPES or x.dtype != weight.dtype:
        return False
    if weight.stride(1) != 1 or x.stride(1) != 1 or weight.stride(0) % 8 or x.stride(0) % 8:
        return False
    if weight.data_ptr() % 16:
        return False  # prefetches ask for whole pieces of 16 bytes
    rows, num_out = padded(x.shape[0]), num_out // 2 if gated else num_out
    return plan(rows, num_out, size, gated=gated) is not None


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Tensor:
    """Return the product, [num_rows, num_out]."""
    (num_rows, size), num_out = x.shape, weight.shape[0]
    num_out = num_out // 2 if gated else num_out
    rows = padded(num_rows)
    chosen = plan(rows, num_out, size, gated=gated)
    assert chosen is not None, f"no plan for {num_rows} rows, {num_out} outputs of {size}"
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    part, counts = None, None
    if chosen.parts > 1:
        shape = (chosen.parts, 2 if gated else 1, num_out, num_rows)
        part = torch.empty(shape, dtype=torch.float32, device=x.device)
        counts = counters(x.device, weight.data_ptr())
    if x.is_cuda:
        _compile_together(x.dtype, x.device, bias is not None)
    tiles = triton.cdiv(num_out, chosen.outputs) * triton.cdiv(num_rows, chosen.rows)
    _few_rows_kernel[(tiles, chosen.parts)](
        *(x, weight, bias, out, part, counts),
        *(x.stride(0), weight.stride(0), num_rows, num_out, size),
        **_constants(chosen, gated=gated, biased=bias is not None),
    )
    return out


def _constants(plan: Plan, *, gated: bool, biased: bool) -> dict[str, Any]:
    """Return what a kernel is compiled for."""
    return {
        "ROWS": plan.rows,
        "OUTPUTS": plan.outputs,
        "BLOCK": plan.block,
        "IS_SPLIT": plan.parts > 1,
        "GATED": gated,
        "BIASED": biased,
        "STAGES": plan.stages,
        "PREFETCH": plan.prefetch if options()["OVERLAPS"] else 0,
        "num_warps": plan.warps,
        **options(),
    }


def _kernels() -> dict[tuple[Plan, bool], None]:
    """Return all kernels that `plan` chooses from, each with whether it is gated."""
    shapes = ((4096, 4096), (4096, 14336), (1024, 3072), (14336, 4096), (3072, 1024))
    found: dict[tuple[Plan, bool], None] = {}
    for rows, (num_out, size), gated in itertools.product((16, 32, 64, 128), shapes, (False, True)):
        if chosen := plan(rows, num_out, size, gated=gated):
            found[evolve(chosen, parts=min(chosen.parts, 2)), gated] = None
    return found


@functools.cache
def _compile_together(dtype: torch.dtype, device: torch.device, biased: bool) -> None:
    """Compile all kernels at once, in threads, the first time that one is asked for."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
        for chosen, gated in _kernels():
            is_split = chosen.parts > 1
            _few_rows_kernel.warmup(
                *(dtype, dtype, dtype if biased else None, dtype),
                *((torch.float32, torch.int32) if is_split else (None, None)),
                *(1024, 1024, 16, 1024, 1024),  # multiples of 16, as in each launch
                **_constants(chosen, gated=gated, biased=biased),
                grid=(1,),
            )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `ops.linear` of a few rows."""
    return _launch(x, weight, bias)


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """Return `ops.linear_silu_mul` of a few rows."""
    return _launch(x, weight, None, gated=True)
