"""Products with experts whose weights are e4m3, in Triton, for more than a few tokens.

As in `experts` a program multiplies a tile of pairs of one expert with a piece of its weight. Here
the piece's rows are those of the product. Tokens are rounded to e4m3 as well, where that is wanted;
elsewhere numbers of 8 bits become the tokens' dtype in registers, from where tensor cores take the
first factor alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs, fp8
from quire_kernels.activation import silu
from quire_kernels.experts_plans import Cut
from quire_kernels.mixtures import ExpertScales
from quire_kernels.overlap import let_next_begin, options, wait_for_previous
from quire_kernels.rounding import INTERPRETED, rounded, widened


@triton.jit
def _product(weight, rows):
    """Return weight @ rows in float32; float32 factors are multiplied in IEEE arithmetic."""
    if INTERPRETED:
        # It has no products of 16 bits or less.
        weight, rows = widened(weight, tl.float32), widened(rows, tl.float32)
    elif rows.dtype != weight.dtype:
        weight = widened(weight, rows.dtype)
    return tl.dot(weight, rows, input_precision="ieee")


@triton.jit
def _scaled(sums, scales_at, x_scales_at, is_output, is_pair, ROUNDED: tl.constexpr):
    """Return sums times the scales of their outputs, and of their rows where there are some."""
    sums *= tl.load(scales_at, mask=is_output, other=0.0)[:, None]
    if ROUNDED:
        sums *= tl.load(x_scales_at, mask=is_pair, other=0.0)[None, :]
    return sums


@triton.jit(do_not_specialize=["num_pairs"], launch_metadata=costs.of_experts)
def _fp8_experts_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    out_ptr,
    pairs_ptr,
    owners_ptr,
    x_stride,
    num_pairs,
    SIZE: tl.constexpr,
    NUM_OUT: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    ROUNDED: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Make OUTPUTS numbers of each pair of a tile.

    HEIGHT outputs and WIDTH inputs share a scale, with WIDTH 0 all inputs do; those of ups are
    behind those of gates. ROUNDED: rows of x have a scale for as many inputs too. What a block of
    columns sums is added in float32: the tensor cores keep some 14 bits. The rest is as in
    `experts`.
    """
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    tile = tl.program_id(1)
    pairs = tl.load(pairs_ptr + tile * ROWS + tl.arange(0, ROWS))
    if tl.min(pairs, 0) >= num_pairs:
        return
    expert = tl.load(owners_ptr + tile).to(tl.int64)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_pair, is_output = pairs < num_pairs, outputs < NUM_OUT
    rows = (pairs // TOP_K).to(tl.int64)
    x_at = x_ptr + rows[None, :] * x_stride
    parts: tl.constexpr = 2 if GATED else 1
    weight_at = weight_ptr + (expert * (NUM_OUT * parts) + outputs)[:, None] * SIZE
    blocks: tl.constexpr = (SIZE + WIDTH - 1) // WIDTH if WIDTH > 0 else 1
    heights: tl.constexpr = (NUM_OUT + HEIGHT - 1) // HEIGHT
    x_scales_at = x_scales_ptr + rows * blocks if ROUNDED else scales_ptr
    scales_at = scales_ptr + (expert * (heights * parts) + outputs // HEIGHT) * blocks
    sums = tl.zeros([OUTPUTS, ROWS], dtype=tl.float32)
    up_sums = tl.zeros([OUTPUTS, ROWS], dtype=tl.float32)
    for start in tl.range(0, SIZE, COLUMNS, num_stages=STAGES):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < SIZE
        x = tl.load(x_at + columns[:, None], mask=is_pair[None, :] & inside[:, None], other=0.0)
        are_weights = is_output[:, None] & inside[None, :]
        weight = tl.load(weight_at + columns[None, :], mask=are_weights, other=0.0)
        part = _product(weight, x)
        if WIDTH > 0:
            block = start // WIDTH
            at, x_at_block = scales_at + block, x_scales_at + block
            part = _scaled(part, at, x_at_block, is_output, is_pair, ROUNDED)
        sums += part
        if GATED:
            up_at = weight_at + NUM_OUT * SIZE + columns[None, :]
            part = _product(tl.load(up_at, mask=are_weights, other=0.0), x)
            if WIDTH > 0:
                at += heights * blocks
                part = _scaled(part, at, x_at_block, is_output, is_pair, ROUNDED)
            up_sums += part
    if WIDTH == 0:
        sums = _scaled(sums, scales_at, x_scales_at, is_output, is_pair, ROUNDED)
    if GATED:
        if WIDTH == 0:
            scales_at += heights
            up_sums = _scaled(up_sums, scales_at, x_scales_at, is_output, is_pair, ROUNDED)
        sums = silu(sums) * up_sums
    out_at = out_ptr + pairs.to(tl.int64)[None, :] * NUM_OUT + outputs[:, None]
    tl.store(
        out_at, rounded(sums, out_ptr.dtype.element_ty), mask=is_pair[None, :] & is_output[:, None]
    )


def products(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    scales: ExpertScales,
    tiles: tuple[Tensor, Tensor],
    top_k: int,
    cuts: tuple[Cut, Cut],
) -> Tensor:
    """Return what each pair's expert makes, [num_pairs, hidden_size]; `weights` gate_up, down."""
    num_pairs = x.shape[0] * top_k
    _, hidden_size, size = weights[1].shape
    hidden = torch.empty((num_pairs, size), dtype=x.dtype, device=x.device)
    made = torch.empty((num_pairs, hidden_size), dtype=x.dtype, device=x.device)
    first, second = (weights[0], scales.gate_up), (weights[1], scales.down)
    product(x, first, hidden, tiles, scales=scales, top_k=top_k, cut=cuts[0])
    product(hidden, second, made, tiles, scales=scales, top_k=1, cut=cuts[1])
    return made


def product(
    x: Tensor,
    weight: tuple[Tensor, Tensor],
    out: Tensor,
    tiles: tuple[Tensor, Tensor],
    *,
    scales: ExpertScales,
    top_k: int,
    cut: Cut,
) -> None:
    """Put one product of each pair into `out`; `weight` are values and scales.

    With twice as many outputs as `out` has, those are gates and ups.
    """
    (num_pairs, num_out), (height, width) = out.shape, scales.block
    x_scales, columns = None, min(cut.columns, width) if width else cut.columns
    if scales.rounds_inputs:
        x, x_scales = fp8.quantize(x, fp8.Scaling(group=width or None))
    _fp8_experts_kernel[(triton.cdiv(num_out, cut.outputs), len(tiles[1]))](
        x,
        x_scales,
        *weight,
        out,
        *tiles,
        x.stride(0),
        num_pairs,
        SIZE=x.shape[1],
        NUM_OUT=num_out,
        TOP_K=top_k,
        ROWS=cut.rows,
        OUTPUTS=cut.outputs,
        COLUMNS=columns,
        HEIGHT=height,
        WIDTH=width,
        GATED=weight[0].shape[1] == 2 * num_out,
        ROUNDED=scales.rounds_inputs,
        STAGES=cut.stages,
        num_warps=cut.warps,
        **options(),
    )
