"""Which experts of which groups a token has, in one launch; `ops.route_in_groups` has the maths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.mixtures import GroupChoice


@triton.jit
def _first_of(values, numbers):
    """Return the largest value, and the least number that has it."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, numbers, 1 << 30), 0)


@triton.jit(launch_metadata=costs.of_tensors)
def _route_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, stride, scale,
    NUM_GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISED: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
):  # fmt: skip
    """Choose TOP_K experts for one token; NUM_GROUPS groups of SIZE lie in a tile [GROUPS, BLOCK].

    What is not an expert, and what was chosen, counts -inf.
    """
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUPS), tl.arange(0, BLOCK)
    numbers = group[:, None] * SIZE + member[None, :]
    is_expert = (group < NUM_GROUPS)[:, None] & (member < SIZE)[None, :]
    low = float("-inf")
    logits = tl.load(logits_ptr + token * stride + numbers, mask=is_expert, other=low)
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        power = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        scores = power / tl.sum(tl.sum(power, 1), 0)
    wanted = scores
    if bias_ptr is not None:
        wanted += tl.load(bias_ptr + numbers, mask=is_expert, other=0.0)
    wanted = tl.where(is_expert, wanted, low)
    if TOP_GROUPS < NUM_GROUPS:
        best = tl.max(wanted, 1)
        if SIGMOID:
            at = tl.min(tl.where(wanted == best[:, None], member[None, :], BLOCK), 1)
            rest = tl.where(member[None, :] == at[:, None], low, wanted)
            best += tl.max(rest, 1)
        is_kept = tl.zeros([GROUPS], dtype=tl.int1)
        for _ in tl.static_range(TOP_GROUPS):
            _best, number = _first_of(tl.where(is_kept, low, best), group)
            is_kept = is_kept | (group == number)
        wanted = tl.where(is_kept[:, None], wanted, low)
    place = tl.arange(0, CHOSEN)
    ids, weights = tl.zeros([CHOSEN], dtype=tl.int32), tl.zeros([CHOSEN], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        largest = tl.max(tl.max(wanted, 1), 0)
        found = tl.min(tl.min(tl.where(wanted == largest, numbers, 1 << 30), 1), 0)
        # Of NaN nothing is the largest, and the id has to be one all the same.
        found = tl.minimum(found, NUM_GROUPS * SIZE - 1)
        own = tl.where((numbers == found) & is_expert, scores, 0.0)
        own = tl.sum(tl.sum(own, 1), 0)
        ids = tl.where(place == k, found, ids)
        weights = tl.where(place == k, own, weights)
        wanted = tl.where(numbers == found, low, wanted)
    if NORMALISED:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    is_chosen = place < TOP_K
    tl.store(weights_ptr + token * TOP_K + place, weights * scale, mask=is_chosen)
    tl.store(ids_ptr + token * TOP_K + place, ids.to(tl.int64), mask=is_chosen)


def route_in_groups(
    logits: Tensor, top_k: int, choice: GroupChoice, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do `ops.route_in_groups` in one launch, for float32 `logits`."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_tokens, top_k), dtype=torch.int64, device=logits.device)
    if not num_tokens:
        return weights, ids
    size = num_experts // choice.num_groups
    _route_kernel[(num_tokens,)](
        logits if logits.stride(1) == 1 else logits.contiguous(),
        bias, weights, ids, logits.stride(0), choice.scale,
        NUM_GROUPS=choice.num_groups,
        SIZE=size,
        TOP_GROUPS=choice.top_groups,
        TOP_K=top_k,
        SIGMOID=choice.scoring == "sigmoid",
        NORMALISED=choice.normalised,
        GROUPS=triton.next_power_of_2(choice.num_groups),
        BLOCK=triton.next_power_of_2(size),
        CHOSEN=triton.next_power_of_2(top_k),
        num_warps=1 if num_experts <= 128 else 4,
    )  # fmt: skip
    return weights, ids
