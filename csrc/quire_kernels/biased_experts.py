"""Products with the experts of a mixture that have biases; `ops.clamped_experts` has their sums.

Pairs of a token and one of its experts lie in tiles as `routing.plan` has them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs, routing
from quire_kernels.rounding import INTERPRETED, rounded

_FEW_ROWS, _MOST_ROWS, _OUTPUTS = 16, 64, 64


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


def products(x: Tensor, weight: Tensor, bias: Tensor, expert_ids: Tensor, top_k: int) -> Tensor:
    """Return x @ weight[e] + bias[e] for each pair, [num_pairs, outputs].

    Pair p has row p // top_k of `x`, and the expert `expert_ids.flatten()[p]`; `weight`
    [num_experts, inputs, outputs] and `bias` [num_experts, outputs] are contiguous. Nothing is read
    back to the host.
    """
    flat = expert_ids.flatten()
    num_experts, size, num_out = weight.shape
    out = torch.empty((len(flat), num_out), dtype=x.dtype, device=x.device)
    if not len(flat):
        return out
    rows = triton.next_power_of_2(max(1, len(flat) // num_experts))
    rows = min(max(rows, _FEW_ROWS), _MOST_ROWS)
    pairs, owners = routing.plan(flat, num_experts, rows)
    x = x if x.stride(-1) == 1 else x.contiguous()
    _product_kernel[(len(owners), triton.cdiv(num_out, _OUTPUTS))](
        x, weight, bias, out, pairs, owners, x.stride(0), len(flat),
        SIZE=size,
        NUM_OUT=num_out,
        TOP_K=top_k,
        ROWS=rows,
        OUTPUTS=_OUTPUTS,
        COLUMNS=64,
        num_warps=4,
        num_stages=3,
    )  # fmt: skip
    return out
