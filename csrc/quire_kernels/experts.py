"""Products with the experts of a mixture, in Triton; `ops.experts` has what they mean.

A pair is a token and one of its experts. Pairs of one expert lie in tiles of ROWS, which are
planned on the device in tensors whose shapes follow from the number of pairs alone:

    expert    0     0     2     3
    pairs   | 4 1 | 7 - | 0 3 | 5 - |        `-`: no pair

Of few pairs each is a tile of its own, without a plan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.activation import silu
from quire_kernels.rounding import INTERPRETED, rounded

# As many as are tiles of their own: the first of their ROWS rows is a pair.
FEW_PAIRS = 32
_FEW_ROWS, _MOST_ROWS = 16, 64
_COLUMNS = 64


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
    experts_ptr,
    x_stride,
    num_pairs,
    SIZE: tl.constexpr,
    NUM_OUT: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANNED: tl.constexpr,
    GATED: tl.constexpr,
):
    """Make OUTPUTS numbers of each pair of a tile.

    Row p // TOP_K of x belongs to pair p. GATED: silu of the first NUM_OUT rows of an expert's
    weight times the rest.
    """
    tile = tl.program_id(0)
    within = tl.arange(0, ROWS)
    if PLANNED:
        pairs = tl.load(pairs_ptr + tile * ROWS + within)
    else:
        pairs = tl.where(within == 0, tile, num_pairs)
    # A tile that nobody needed has no pair at all.
    if tl.min(pairs, 0) >= num_pairs:
        return
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_pair, is_output = (pairs < num_pairs)[:, None], (outputs < NUM_OUT)[None, :]
    x_at = x_ptr + (pairs // TOP_K).to(tl.int64)[:, None] * x_stride
    num_rows: tl.constexpr = NUM_OUT * (2 if GATED else 1)
    weight_at = weight_ptr + (expert * num_rows + outputs)[None, :] * SIZE
    sums = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    up_sums = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    for start in range(0, SIZE, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < SIZE
        x = tl.load(x_at + columns[None, :], mask=is_pair & inside[None, :], other=0.0)
        is_weight = is_output & inside[:, None]
        weight = tl.load(weight_at + columns[:, None], mask=is_weight, other=0.0)
        sums = _product(x, weight, sums)
        if GATED:
            up = tl.load(weight_at + NUM_OUT * SIZE + columns[:, None], mask=is_weight, other=0.0)
            up_sums = _product(x, up, up_sums)
    if GATED:
        sums = silu(sums) * up_sums
    out_at = out_ptr + pairs.to(tl.int64)[:, None] * NUM_OUT + outputs[None, :]
    tl.store(out_at, rounded(sums, out_ptr.dtype.element_ty), mask=is_pair & is_output)


@triton.jit(launch_metadata=costs.of_tensors)
def _weigh_kernel(
    made_ptr, weights_ptr, out_ptr, SIZE: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up BLOCK numbers of what one token's experts made."""
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


def plan(expert_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return the pairs of each tile, [num_tiles * rows], and its expert, [num_tiles].

    `expert_ids` int64 [num_pairs]. Where there is no pair the number is num_pairs; tiles at the end
    may have none. Nothing is read back to the host.
    """
    num_pairs, device = len(expert_ids), expert_ids.device
    num_tiles = min(num_pairs, num_pairs // rows + min(num_experts, num_pairs))
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, expert_ids, torch.ones_like(expert_ids))
    tiles = (counts + (rows - 1)) // rows
    last_tiles = tiles.cumsum(0)
    order = expert_ids.argsort(stable=True)
    owners = expert_ids[order]
    # How many of its expert's pairs come before a pair.
    rank = torch.arange(num_pairs, device=device) - (counts.cumsum(0) - counts)[owners]
    pairs = torch.full((num_tiles * rows,), num_pairs, dtype=torch.int64, device=device)
    pairs.scatter_(0, (last_tiles - tiles)[owners] * rows + rank, order)
    numbers = torch.arange(num_tiles, device=device)
    experts = torch.searchsorted(last_tiles, numbers, right=True).clamp_(max=num_experts - 1)
    return pairs, experts


def _rows_of(num_pairs: int, num_experts: int) -> int:
    """Return the rows of a tile: about as many as an expert has pairs."""
    rows = triton.next_power_of_2(max(1, num_pairs // num_experts))
    return min(max(rows, _FEW_ROWS), _MOST_ROWS)


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, expert_ids: Tensor
) -> Tensor:
    """Return `ops.experts` of rows whose values are neighbours; the weights are contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    top_k, flat = expert_ids.shape[1], expert_ids.flatten()
    if not len(flat):
        return out
    is_planned = len(flat) > FEW_PAIRS
    rows = _rows_of(len(flat), len(gate_up)) if is_planned else _FEW_ROWS
    pairs, owners = plan(flat, len(gate_up), rows) if is_planned else (flat, flat)
    size, hidden_size = gate_up.shape[1] // 2, down.shape[1]
    hidden = torch.empty((len(flat), size), dtype=x.dtype, device=x.device)
    made = torch.empty((len(flat), hidden_size), dtype=x.dtype, device=x.device)
    outputs = 64 if is_planned else 32
    for given, weight, into, is_first in ((x, gate_up, hidden, True), (hidden, down, made, False)):
        _experts_kernel[(len(owners), triton.cdiv(into.shape[1], outputs))](
            given,
            weight,
            into,
            pairs,
            owners,
            given.stride(0),
            len(flat),
            SIZE=given.shape[1],
            NUM_OUT=into.shape[1],
            TOP_K=top_k if is_first else 1,
            ROWS=rows,
            OUTPUTS=outputs,
            COLUMNS=_COLUMNS,
            PLANNED=is_planned,
            GATED=is_first,
            num_warps=4,
            num_stages=3,
        )
    block = min(1024, triton.next_power_of_2(hidden_size))
    _weigh_kernel[(len(out), triton.cdiv(hidden_size, block))](
        made, weights.contiguous(), out, SIZE=hidden_size, TOP_K=top_k, BLOCK=block
    )
    return out
