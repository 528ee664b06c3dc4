"""Products with experts of a few tokens, in Triton: every pair by itself, without a plan.

A pair is a token and one of its experts. As in `gemv`, a program makes a few outputs and reads
their rows of the weight once; those of the second product add up all experts of a token:

    gate_up     program (pair, outputs)     silu(gate) * up of some outputs of an expert
    down        program (token, outputs)    the same outputs of each expert, weighed and summed
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.activation import silu
from quire_kernels.gemv import _weights
from quire_kernels.mixtures import ExpertScales
from quire_kernels.overlap import let_next_begin, options, wait_for_previous
from quire_kernels.rounding import rounded, widened

# More tokens share experts, of which a tile reads the weight once.
MAX_TOKENS = 4


@triton.jit
def _summed(products, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return sums over neighbours, which lie in one thread."""
    return tl.sum(tl.reshape(products, (ROWS, BLOCK // 8, 8)), axis=2)


@triton.jit
def _scaled(
    sums,
    scales_ptr,
    rows,
    are_inside,
    start,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return sums over neighbours times the scales of their blocks of WIDTH inputs."""
    blocks: tl.constexpr = (SIZE + WIDTH - 1) // WIDTH
    columns = start + tl.arange(0, BLOCK // 8) * 8
    at = scales_ptr + rows[:, None] * blocks + (columns // WIDTH)[None, :]
    inside = are_inside[:, None] & (columns < SIZE)[None, :]
    return sums * tl.load(at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_pairs"], launch_metadata=costs.of_experts)
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    out_ptr,
    ids_ptr,
    x_stride,
    num_pairs,
    SIZE: tl.constexpr,
    NUM_OUT: tl.constexpr,
    TOP_K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Make OUTPUTS numbers of a pair; rows of gate and up lie beside one another.

    HEIGHT outputs and WIDTH inputs, with 0 all of them, share a scale; HEIGHT 0: there is none.
    """
    let_next_begin(OVERLAPS)
    pair = tl.program_id(0)
    first = tl.program_id(1) * OUTPUTS
    places = tl.arange(0, OUTPUTS * 2)
    are_inside = first + places // 2 < NUM_OUT
    columns = tl.arange(0, BLOCK)
    wait_for_previous(OVERLAPS)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    rows = expert * (2 * NUM_OUT) + first + places // 2 + places % 2 * NUM_OUT
    if HEIGHT > 0:
        heights: tl.constexpr = (NUM_OUT + HEIGHT - 1) // HEIGHT
        scale_rows = (first + places // 2) // HEIGHT + places % 2 * heights
        scale_rows += expert * (2 * heights)
    x_ptr += (pair // TOP_K).to(tl.int64) * x_stride
    weights = _weights(weight_ptr, rows, are_inside, columns, SIZE, SIZE)
    sums = tl.zeros((OUTPUTS * 2, BLOCK // 8), tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        at = start + columns
        if start + BLOCK < SIZE:
            later = _weights(weight_ptr, rows, are_inside, at + BLOCK, SIZE, SIZE)
        x = tl.load(x_ptr + at, mask=at < SIZE, other=0.0)
        products = widened(weights, tl.float32) * x.to(tl.float32)[None, :]
        part = _summed(products, OUTPUTS * 2, BLOCK)
        if HEIGHT > 0 and WIDTH > 0:
            part = _scaled(part, scales_ptr, scale_rows, are_inside, start, SIZE, WIDTH, BLOCK)
        sums += part
        if start + BLOCK < SIZE:
            weights = later
    out = tl.sum(sums, axis=1)
    if HEIGHT > 0 and WIDTH == 0:
        out *= tl.load(scales_ptr + scale_rows, mask=are_inside, other=0.0)
    gate, up = tl.split(tl.reshape(out, (OUTPUTS, 2)))
    outputs = first + tl.arange(0, OUTPUTS)
    out = rounded(silu(gate) * up, out_ptr.dtype.element_ty)
    tl.store(out_ptr + pair.to(tl.int64) * NUM_OUT + outputs, out, mask=outputs < NUM_OUT)


@triton.jit(do_not_specialize=["num_pairs"], launch_metadata=costs.of_experts)
def _down_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    out_ptr,
    ids_ptr,
    shares_ptr,
    num_pairs,
    SIZE: tl.constexpr,
    NUM_OUT: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Make OUTPUTS numbers of a token: a row is one of them of one of the token's experts."""
    let_next_begin(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, SLOTS * OUTPUTS)
    slots, outputs = places // OUTPUTS, tl.program_id(1) * OUTPUTS + places % OUTPUTS
    are_inside = (slots < TOP_K) & (outputs < NUM_OUT)
    columns = tl.arange(0, BLOCK)
    wait_for_previous(OVERLAPS)
    pairs = token * TOP_K + slots
    experts = tl.load(ids_ptr + pairs, mask=slots < TOP_K, other=0)
    rows = experts * NUM_OUT + outputs
    if HEIGHT > 0:
        heights: tl.constexpr = (NUM_OUT + HEIGHT - 1) // HEIGHT
        scale_rows = experts * heights + outputs // HEIGHT
    weights = _weights(weight_ptr, rows, are_inside, columns, SIZE, SIZE)
    shares = tl.load(shares_ptr + pairs, mask=slots < TOP_K, other=0.0).to(tl.float32)
    sums = tl.zeros((SLOTS * OUTPUTS, BLOCK // 8), tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        at = start + columns
        if start + BLOCK < SIZE:
            later = _weights(weight_ptr, rows, are_inside, at + BLOCK, SIZE, SIZE)
        inside = are_inside[:, None] & (at < SIZE)[None, :]
        x = tl.load(x_ptr + pairs[:, None] * SIZE + at[None, :], mask=inside, other=0.0)
        part = _summed(widened(weights, tl.float32) * x.to(tl.float32), SLOTS * OUTPUTS, BLOCK)
        if HEIGHT > 0 and WIDTH > 0:
            part = _scaled(part, scales_ptr, scale_rows, are_inside, start, SIZE, WIDTH, BLOCK)
        sums += part
        if start + BLOCK < SIZE:
            weights = later
    made = tl.sum(sums, axis=1)
    if HEIGHT > 0 and WIDTH == 0:
        made *= tl.load(scales_ptr + scale_rows, mask=are_inside, other=0.0)
    made = tl.where(are_inside, made * shares, 0.0)
    out = tl.sum(tl.reshape(made, (SLOTS, OUTPUTS)), axis=0)
    at = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + token * NUM_OUT + at, rounded(out, dtype), mask=at < NUM_OUT)


def _block(size: int, most: int) -> int:
    """Return columns a block: at most `most`, and as few as leave little of the last one empty."""
    block = most
    while block > 128 and -size % block * 8 > size:
        block //= 2
    return block


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    *,
    scales: ExpertScales | None = None,
) -> Tensor:
    """Return `ops.experts` of a few tokens whose values are neighbours."""
    num_tokens, top_k = expert_ids.shape
    size, hidden_size = gate_up.shape[1] // 2, down.shape[1]
    hidden = torch.empty((num_tokens * top_k, size), dtype=x.dtype, device=x.device)
    out = torch.empty((num_tokens, hidden_size), dtype=x.dtype, device=x.device)
    height, width = (0, 0) if scales is None else scales.block
    shared = {"TOP_K": top_k, "HEIGHT": height, "WIDTH": width, "num_warps": 4, **options()}
    outputs, slots = 4, triton.next_power_of_2(top_k)
    _gate_up_kernel[(len(hidden), triton.cdiv(size, outputs))](
        x,
        gate_up,
        None if scales is None else scales.gate_up,
        hidden,
        expert_ids,
        x.stride(0),
        len(hidden),
        SIZE=x.shape[1],
        NUM_OUT=size,
        OUTPUTS=outputs,
        BLOCK=_block(x.shape[1], 1024),
        **shared,
    )
    # The loop is unrolled: of long rows longer blocks, so that registers suffice.
    is_long = size > 2048
    outputs, block = (1, max(256, 4096 // slots)) if is_long else (max(1, 16 // slots), 256)
    _down_kernel[(num_tokens, triton.cdiv(hidden_size, outputs))](
        hidden,
        down,
        None if scales is None else scales.down,
        out,
        expert_ids,
        weights,
        len(hidden),
        SIZE=size,
        NUM_OUT=hidden_size,
        SLOTS=slots,
        OUTPUTS=outputs,
        BLOCK=_block(size, block),
        **shared,
    )
    return out
