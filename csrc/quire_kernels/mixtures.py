"""Mixtures of experts: which experts a token has, and sums over them in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from attrs import frozen
from torch import Tensor

from quire_kernels.with_triton import kernels


@frozen
class ExpertScales:
    """Scales of experts' weights in e4m3.

    `gate_up` and `down` float32 [num_experts, outputs, inputs in blocks], those of gates before
    those of ups. `block`: outputs and inputs that share a scale, inputs a power of two from 16 on
    or 0: all of them. `rounds_inputs`: what is multiplied may be rounded to e4m3 too, with a scale
    for a row's inputs of a block.
    """

    gate_up: Tensor
    down: Tensor
    block: tuple[int, int]
    rounds_inputs: bool = False


def scaled_up(values: Tensor, scales: Tensor, block: tuple[int, int], parts: int = 1) -> Tensor:
    """Return `values` [outputs, inputs] times `scales`, float32; `parts` have blocks of their own.

    `scales` as one expert has them in `ExpertScales`.
    """
    num_out, num_in = values.shape[0] // parts, values.shape[1]
    wide = scales.repeat_interleave(block[1] or num_in, 1)[:, :num_in]
    tall = [own.repeat_interleave(block[0], 0)[:num_out] for own in wide.chunk(parts)]
    return values.float() * torch.cat(tall)


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


def scaled_experts(
    x: Tensor,
    given: tuple[Tensor, Tensor],
    weights: Tensor,
    expert_ids: Tensor,
    scales: ExpertScales,
) -> Tensor:
    """Return `ops.experts` of weights in e4m3, `given` gate_up and down, in PyTorch."""

    def one(rows: Tensor, expert: int) -> Tensor:
        gate_up = scaled_up(given[0][expert], scales.gate_up[expert], scales.block, 2)
        gate, up = functional.linear(rows.float(), gate_up).to(x.dtype).float().chunk(2, -1)
        hidden = (functional.silu(gate) * up).to(x.dtype)
        down = scaled_up(given[1][expert], scales.down[expert], scales.block)
        return functional.linear(hidden.float(), down).to(x.dtype)

    return sum_over_experts(x, weights, expert_ids, len(given[0]), one)


def why_no_experts(device: str) -> str | None:
    """Return why `experts` does not run on a device, in a sentence; None: it does."""
    is_served = torch.device(device).type != "cuda" or kernels("experts") is not None
    return None if is_served else "experts on a GPU need Triton; `pip install triton` brings it"
