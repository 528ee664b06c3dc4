"""Mixtures of experts: which experts a token has, and sums over them in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quire_kernels.with_triton import kernels


def route(logits: Tensor, top_k: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """Return the weights and the ids of each token's `top_k` experts, the likeliest first.

    `logits` [num_tokens, num_experts]; their softmax is taken over all experts, in float32 or
    wider, as the weights [num_tokens, top_k] are; ids int64, those of a token all different.
    `normalise`: weights of a token sum to one.
    Source: Shazeer et al., "Outrageously large neural networks", 2017.
    """
    if logits.is_cuda and (routing := kernels("routing")) and routing.serves(logits, top_k):
        found: tuple[Tensor, Tensor] = routing.route(logits, top_k, normalise=normalise)
        return found
    wide = logits if logits.dtype == torch.float64 else logits.float()
    weights, expert_ids = wide.softmax(dim=-1).topk(top_k, dim=-1)
    if normalise:
        weights /= weights.sum(dim=-1, keepdim=True)
    return weights, expert_ids


def sum_over_experts(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    num_experts: int,
    expert: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Return the weighted sums of `expert(rows of x, its number)` over each token's experts.

    `x` [num_tokens, size], `weights` and `expert_ids` [num_tokens, top_k]. An expert is called
    once, with its tokens in order, or not at all; how many it has is read back from the device.
    """
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    tokens = order // expert_ids.shape[1]
    counts = flat.bincount(minlength=num_experts).tolist()
    scales = weights.flatten()[order].unsqueeze(1).split(counts)
    total = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    for number, (own, scale) in enumerate(zip(tokens.split(counts), scales, strict=True)):
        if len(own):
            total.index_add_(0, own, expert(x[own], number) * scale)
    return total.to(x.dtype)


def why_no_experts(device: str) -> str | None:
    """Return why `experts` does not run on a device, in a sentence; None: it does."""
    is_served = torch.device(device).type != "cuda" or kernels("experts") is not None
    return None if is_served else "experts on a GPU need Triton; `pip install triton` brings it"
