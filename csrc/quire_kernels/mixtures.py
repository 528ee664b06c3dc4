"""Mixtures of experts: which experts a token has, and sums over them in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as functional
from attrs import frozen
from torch import Tensor

from quire_kernels.smooth import silu_mul
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


@frozen(kw_only=True)
class GroupChoice:
    """How `route_in_groups` chooses among `num_groups` groups of experts that are neighbours.

    `scoring` makes scores of logits: "softmax" over all experts, "sigmoid" of each. A group is as
    good as its best expert, or with "sigmoid" as its best two together; experts of the best
    `top_groups` are chosen. `normalised`: a token's scores are divided by their sum; then they are
    multiplied by `scale`.
    """

    scoring: str
    num_groups: int
    top_groups: int
    normalised: bool
    scale: float


def route_in_groups(
    logits: Tensor, top_k: int, choice: GroupChoice, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the weights and the ids of each token's `top_k` experts, of its best groups alone.

    `logits` [num_tokens, num_experts], float32 or wider; `bias` [num_experts] is added to scores
    for the choice, and not for the weights. Both come back as [num_tokens, top_k]; which of equal
    experts is chosen is not said.
    Source: DeepSeek-AI, "DeepSeek-V3 technical report", 2024, 2.1.2.
    """
    is_wide = logits.dtype == torch.float32
    if logits.is_cuda and is_wide and (routing := kernels("group_routing")):
        found: tuple[Tensor, Tensor] = routing.route_in_groups(logits, top_k, choice, bias)
        return found
    by_two = choice.scoring == "sigmoid"
    scores = logits.sigmoid() if by_two else logits.softmax(-1)
    wanted = scores if bias is None else scores + bias
    if choice.num_groups > 1:
        grouped = wanted.unflatten(-1, (choice.num_groups, -1))
        best = grouped.topk(2, -1).values.sum(-1) if by_two else grouped.amax(-1)
        kept = best.topk(choice.top_groups, -1).indices
        is_out = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
        wanted = grouped.masked_fill(is_out.unsqueeze(-1), -torch.inf).flatten(-2)
    expert_ids = wanted.topk(top_k, -1).indices
    weights = scores.gather(-1, expert_ids)
    if choice.normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * choice.scale, expert_ids


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


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    *,
    scales: ExpertScales | None = None,
) -> Tensor:
    """Return the weighted sums of what the chosen experts make of each token.

    Expert e makes down[e] @ silu_mul(gate_up[e] @ x). `x` [num_tokens, hidden_size], `gate_up`
    [num_experts, 2 * size, hidden_size] gates first, `down` [num_experts, hidden_size, size];
    `weights` and `expert_ids` [num_tokens, top_k] as `route` gives them. `scales`: of weights in
    e4m3, which are multiplied in x's dtype.
    """
    if x.is_cuda:
        given = (x, gate_up, down, weights, expert_ids)
        out: Tensor = kernels("experts").experts(*given, scales=scales)
        return out
    if scales is not None:
        return scaled_experts(x, (gate_up, down), weights, expert_ids, scales)

    def one(rows: Tensor, expert: int) -> Tensor:
        return functional.linear(silu_mul(functional.linear(rows, gate_up[expert])), down[expert])

    return sum_over_experts(x, weights, expert_ids, len(gate_up), one)


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


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """Return (up + 1) * gate * sigmoid(alpha * gate) of `gate_up` [.., 2 * size], in its dtype.

    Gates and ups take turns; gates are at most `limit`, ups between -limit and limit.
    Source: OpenAI, "gpt-oss-120b and gpt-oss-20b model card", 2025.
    """
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def clamped_experts(
    x: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    weights: Tensor,
    expert_ids: Tensor,
    *,
    alpha: float,
    limit: float,
) -> Tensor:
    """Return the weighted sums of what the chosen experts make of each token, by `clamped_swiglu`.

    Expert e makes clamped_swiglu(x @ gate_up[e] + bias) @ down[e] + bias. `x` [num_tokens,
    hidden_size]; weights and biases of `gate_up` [num_experts, hidden_size, 2 * size] and
    [num_experts, 2 * size], of `down` [num_experts, size, hidden_size] and [num_experts,
    hidden_size]; `weights` and `expert_ids` [num_tokens, top_k] as `route` gives them.
    """
    if x.is_cuda:
        activation = functools.partial(clamped_swiglu, alpha=alpha, limit=limit)
        own = kernels("biased_experts").experts(x, gate_up, down, expert_ids, activation)
        return (own * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def one(rows: Tensor, expert: int) -> Tensor:
        made = torch.addmm(gate_up[1][expert], rows, gate_up[0][expert])
        made = clamped_swiglu(made, alpha=alpha, limit=limit)
        return torch.addmm(down[1][expert], made, down[0][expert])

    return sum_over_experts(x, weights, expert_ids, len(gate_up[0]), one)


def expert_products(
    x: Tensor,
    weight: Tensor,
    expert_ids: Tensor,
    *,
    top_k: int,
    bias: Tensor | None = None,
    is_transposed: bool = False,
) -> Tensor:
    """Return weight[e] @ x + bias[e] for each pair of a token and an expert, [num_pairs, outputs].

    Pair p has row p // top_k of `x`, and the expert `expert_ids.flatten()[p]`; `weight`
    [num_experts, outputs, inputs], with `is_transposed` [num_experts, inputs, outputs], and `bias`
    [num_experts, outputs]. On CUDA nothing is read back.
    """
    flat = expert_ids.flatten()
    if x.is_cuda:
        made: Tensor = kernels("pairs").products(x, weight, flat, top_k, bias, is_transposed)
        return made
    out = x.new_empty(len(flat), weight.shape[2 if is_transposed else 1])
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(weight)).tolist()
    for number, own in enumerate(order.split(counts)):
        if len(own):
            factor = weight[number].t() if is_transposed else weight[number]
            added = None if bias is None else bias[number]
            out[own] = functional.linear(x[own // top_k], factor, added)
    return out


def why_no_experts(device: str) -> str | None:
    """Return why `experts` does not run on a device, in a sentence; None: it does."""
    is_served = torch.device(device).type != "cuda" or kernels("experts") is not None
    return None if is_served else "experts on a GPU need Triton; `pip install triton` brings it"
