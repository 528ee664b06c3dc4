"""Products with the experts of a mixture, in Triton; `ops.experts` has what they mean.

A pair is a token and one of its experts. Pairs of one expert lie in tiles of ROWS, which are
planned on the device in tensors whose shapes follow from the number of pairs alone:

    expert    0     0     2     3
    pairs   | 4 1 | 7 - | 0 3 | 5 - |        `-`: no pair

How the products are cut is `experts_plans`'. A few tokens go to `few_experts`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs, few_experts, fp8_experts, routing
from quire_kernels.activation import silu
from quire_kernels.experts_plans import Cut, cuts_of
from quire_kernels.mixtures import ExpertScales
from quire_kernels.overlap import let_next_begin, options, wait_for_previous
from quire_kernels.rounding import INTERPRETED, rounded


@triton.jit
def _product(rows, weight, sums):
    """Return sums + rows @ weight; float32 factors are multiplied in IEEE arithmetic."""
    if INTERPRETED:
        # It has no products of 16 bits.
        rows, weight = rows.to(tl.float32), weight.to(tl.float32)
    return tl.dot(rows, weight, sums, input_precision="ieee")


@triton.jit(
    do_not_specialize=["num_pairs"],
    launch_metadata=costs.of_experts,
)
def _experts_kernel(
    x_ptr,
    weight_ptr,
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
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Make OUTPUTS numbers of each pair of a tile.

    Row p // TOP_K of x belongs to pair p. GATED: silu of the first NUM_OUT rows of an expert's
    weight times the rest. Programs of a tile are neighbours, so that they share its rows in the L2.
    """
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    tile = tl.program_id(1)
    pairs = tl.load(pairs_ptr + tile * ROWS + tl.arange(0, ROWS))
    # A tile that nobody needed has no pair at all.
    if tl.min(pairs, 0) >= num_pairs:
        return
    expert = tl.load(owners_ptr + tile).to(tl.int64)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_pair, is_output = (pairs < num_pairs)[:, None], (outputs < NUM_OUT)[None, :]
    x_at = x_ptr + (pairs // TOP_K).to(tl.int64)[:, None] * x_stride
    num_rows: tl.constexpr = NUM_OUT * (2 if GATED else 1)
    weight_at = weight_ptr + (expert * num_rows + outputs)[None, :] * SIZE
    sums = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    up_sums = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    for start in tl.range(0, SIZE, COLUMNS, num_stages=STAGES):
        columns = start + tl.arange(0, COLUMNS)
        if SIZE % COLUMNS == 0:
            are_rows, are_weights = is_pair, is_output
        else:
            inside = columns < SIZE
            are_rows, are_weights = is_pair & inside[None, :], is_output & inside[:, None]
        x = tl.load(x_at + columns[None, :], mask=are_rows, other=0.0)
        weight = tl.load(weight_at + columns[:, None], mask=are_weights, other=0.0)
        sums = _product(x, weight, sums)
        if GATED:
            up_at = weight_at + NUM_OUT * SIZE + columns[:, None]
            up = tl.load(up_at, mask=are_weights, other=0.0)
            up_sums = _product(x, up, up_sums)
    if GATED:
        sums = silu(sums) * up_sums
    out_at = out_ptr + pairs.to(tl.int64)[:, None] * NUM_OUT + outputs[None, :]
    tl.store(out_at, rounded(sums, out_ptr.dtype.element_ty), mask=is_pair & is_output)


@triton.jit(launch_metadata=costs.of_tensors)
def _weigh_kernel(
    made_ptr,
    weights_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Add up BLOCK numbers of what one token's experts made."""
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for number in range(TOP_K):
        pair = token * TOP_K + number
        made = tl.load(made_ptr + pair * SIZE + columns, mask=inside, other=0.0)
        total += made.to(tl.float32) * tl.load(weights_ptr + pair).to(tl.float32)
    out = rounded(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * SIZE + columns, out, mask=inside)


def product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tiles: tuple[Tensor, Tensor],
    *,
    top_k: int,
    gated: bool,
    cut: Cut,
) -> None:
    """Put one product of each pair into `out` [num_pairs, num_out]; `tiles` as `routing.plan`."""
    pairs, owners = tiles
    num_pairs, num_out = out.shape
    _experts_kernel[(triton.cdiv(num_out, cut.outputs), len(owners))](
        x,
        weight,
        out,
        pairs,
        owners,
        x.stride(0),
        num_pairs,
        SIZE=x.shape[1],
        NUM_OUT=num_out,
        TOP_K=top_k,
        ROWS=cut.rows,
        OUTPUTS=cut.outputs,
        COLUMNS=cut.columns,
        GATED=gated,
        STAGES=cut.stages,
        num_warps=cut.warps,
        **options(),
    )


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    *,
    scales: ExpertScales | None = None,
) -> Tensor:
    """Return `ops.experts` of rows whose values are neighbours; the weights are contiguous."""
    num_tokens, top_k = expert_ids.shape
    weights, expert_ids = weights.contiguous(), expert_ids.contiguous()
    if 0 < num_tokens <= few_experts.MAX_TOKENS:
        return few_experts.experts(x, gate_up, down, weights, expert_ids, scales=scales)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not num_tokens:
        return out
    flat, (num_experts, hidden_size, size) = expert_ids.flatten(), down.shape
    shape = (num_experts, top_k, hidden_size, size)
    first, second = cuts_of(x.device, gate_up.dtype, len(flat), shape)
    tiles = routing.plan(flat, num_experts, first.rows)
    if scales is None:
        hidden = torch.empty((len(flat), size), dtype=x.dtype, device=x.device)
        made = torch.empty((len(flat), hidden_size), dtype=x.dtype, device=x.device)
        product(x, gate_up, hidden, tiles, top_k=top_k, gated=True, cut=first)
        product(hidden, down, made, tiles, top_k=1, gated=False, cut=second)
    else:
        made = fp8_experts.products(x, (gate_up, down), scales, tiles, top_k, (first, second))
    block = min(1024, triton.next_power_of_2(hidden_size))
    _weigh_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        made, weights, out, SIZE=hidden_size, TOP_K=top_k, BLOCK=block, **options()
    )
    return out
