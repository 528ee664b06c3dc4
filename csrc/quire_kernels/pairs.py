"""Products of pairs of a token and an expert, one at a time; `ops.expert_products` says which."""

from __future__ import annotations

import torch
from torch import Tensor

from quire_kernels import biased_experts, experts, routing
from quire_kernels.experts_plans import cuts_of


def products(
    x: Tensor,
    weight: Tensor,
    expert_ids: Tensor,
    top_k: int,
    bias: Tensor | None,
    is_transposed: bool,
) -> Tensor:
    """Return `ops.expert_products` of flat `expert_ids`; the weights are contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if is_transposed:
        if bias is None:
            bias = x.new_zeros(weight.shape[0], weight.shape[2])
        return biased_experts.products(x, weight, bias, expert_ids, top_k)
    num_experts, num_out, size = weight.shape
    out = torch.empty((len(expert_ids), num_out), dtype=x.dtype, device=x.device)
    if not len(expert_ids):
        return out
    _, cut = cuts_of(x.device, weight.dtype, len(expert_ids), (num_experts, top_k, num_out, size))
    tiles = routing.plan(expert_ids, num_experts, cut.rows)
    experts.product(x, weight, out, tiles, top_k=top_k, gated=False, cut=cut)
    return out if bias is None else out.add_(bias[expert_ids])
