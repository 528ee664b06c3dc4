"""Products with the experts of a mixture that have biases; `ops.clamped_experts` has their sums.

Pairs of a token and one of its experts lie in tiles as `routing.plan` has them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs, routing
from quire_kernels.experts_plans import Cut, biased_cuts_of
from quire_kernels.rounding import INTERPRETED, rounded


@triton.jit(do_not_specialize=["num_pairs"], launch_metadata=costs.of_experts)
def _product_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, pairs_ptr, owners_ptr, x_stride, num_pairs,
    SIZE: tl.constexpr, NUM_OUT: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Make OUTPUTS numbers of each pair of a tile: row p // TOP_K of x belongs to pair p."""
    tile = tl.program_id(0)
    within = tl.arange(0, ROWS)
    pairs = tl.load(pairs_ptr + tile * ROWS + within)
    # A tile that nobody needed has no pair at all.
    if tl.min(pairs, 0) >= num_pairs:
        return
    expert = tl.load(owners_ptr + tile).to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_pair, is_output = (pairs < num_pairs)[:, None], outputs < NUM_OUT
    x_at = x_ptr + (pairs // TOP_K).to(tl.int64)[:, None] * x_stride
    weight_at = weight_ptr + expert * SIZE * NUM_OUT + outputs[None, :]
    sums = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    for start in range(0, SIZE, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < SIZE
        x = tl.load(x_at + columns[None, :], mask=is_pair & inside[None, :], other=0.0)
        is_weight = is_output[None, :] & inside[:, None]
        weight = tl.load(weight_at + columns[:, None] * NUM_OUT, mask=is_weight, other=0.0)
        if INTERPRETED:
            # It has no products of 16 bits.
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    bias = tl.load(bias_ptr + expert * NUM_OUT + outputs, mask=is_output, other=0.0)
    sums += bias.to(tl.float32)[None, :]
    out_at = out_ptr + pairs.to(tl.int64)[:, None] * NUM_OUT + outputs[None, :]
    is_stored = is_pair & is_output[None, :]
    tl.store(out_at, rounded(sums, out_ptr.dtype.element_ty), mask=is_stored)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tiles: tuple[Tensor, Tensor],
    *,
    top_k: int,
    num_pairs: int,
    cut: Cut,
) -> Tensor:
    """Return x @ weight[e] + bias[e] for each pair, [num_pairs, outputs].

    Pair p has row p // top_k of `x`, and the expert that `tiles`, as `routing.plan` makes them,
    say; `weight` [num_experts, inputs, outputs] and `bias` [num_experts, outputs] are contiguous.
    """
    pairs, owners = tiles
    _, size, num_out = weight.shape
    out = torch.empty((num_pairs, num_out), dtype=x.dtype, device=x.device)
    x = x if x.stride(-1) == 1 else x.contiguous()
    _product_kernel[(len(owners), triton.cdiv(num_out, cut.outputs))](
        x, weight, bias, out, pairs, owners, x.stride(0), num_pairs,
        SIZE=size,
        NUM_OUT=num_out,
        TOP_K=top_k,
        ROWS=cut.rows,
        OUTPUTS=cut.outputs,
        COLUMNS=cut.columns,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )  # fmt: skip
    return out


def products(x: Tensor, weight: Tensor, bias: Tensor, expert_ids: Tensor, top_k: int) -> Tensor:
    """Return `product` of pairs with the experts `expert_ids.flatten()`, with a plan of its own."""
    flat, (num_experts, size, num_out) = expert_ids.flatten(), weight.shape
    if not len(flat):
        return x.new_empty(0, num_out)
    _, cut = biased_cuts_of(x.device, x.dtype, len(flat), (num_experts, top_k, num_out, size))
    tiles = routing.plan(flat, num_experts, cut.rows)
    return product(x, weight, bias, tiles, top_k=top_k, num_pairs=len(flat), cut=cut)


def experts(
    x: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    expert_ids: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what each chosen expert makes, [num_tokens, top_k, hidden_size].

    Weights and biases as `ops.clamped_experts` has them. Nothing is read back to the host.
    """
    flat, (num_experts, size, hidden_size) = expert_ids.flatten(), down[0].shape
    if not len(flat):
        return x.new_empty(*expert_ids.shape, hidden_size)
    shape = (num_experts, expert_ids.shape[1], hidden_size, size)
    first, second = biased_cuts_of(x.device, x.dtype, len(flat), shape)
    tiles = routing.plan(flat, num_experts, first.rows)
    num_pairs = len(flat)
    made = product(x, *gate_up, tiles, top_k=expert_ids.shape[1], num_pairs=num_pairs, cut=first)
    made = product(activation(made), *down, tiles, top_k=1, num_pairs=num_pairs, cut=second)
    return made.unflatten(0, expert_ids.shape)
