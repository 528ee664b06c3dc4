"""Choices of experts in groups, and products with experts that have biases."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, check, draw, poison
from torch import Tensor

from quire_kernels import ops
from quire_kernels.mixtures import clamped_swiglu

pytest.importorskip("triton")
from quire_kernels import biased_experts, group_routing

# Experts, experts a token, and how they are chosen; sizes that are no powers of two too.
CHOICES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "v2-lite": (64, 6, {"scoring": "softmax", "num_groups": 1, "top_groups": 1}),
    "v2": (160, 6, {"scoring": "softmax", "num_groups": 8, "top_groups": 3, "scale": 16.0}),
    "v3": (256, 8, {"normalised": True, "num_groups": 8, "top_groups": 4}),
    "small": (6, 3, {"normalised": False, "num_groups": 3, "top_groups": 2}),
    "all of it": (6, 6, {"normalised": True, "num_groups": 2, "top_groups": 2}),
}


def choice_of(name: str) -> tuple[int, int, ops.GroupChoice]:
    num_experts, top_k, changes = CHOICES[name]
    values = {"scoring": "sigmoid", "normalised": False, "scale": 2.5, **changes}
    return num_experts, top_k, ops.GroupChoice(**values)


def by_hand(logits: Tensor, bias: Tensor | None, top_k: int, choice: ops.GroupChoice) -> Any:
    """Return the weights and ids of one token, in Python."""
    scores = logits.softmax(-1) if choice.scoring == "softmax" else logits.sigmoid()
    wanted = (scores if bias is None else scores + bias).tolist()
    size = len(wanted) // choice.num_groups
    groups = [sorted(wanted[i : i + size])[::-1] for i in range(0, len(wanted), size)]
    count = 2 if choice.scoring == "sigmoid" else 1
    worth = [sum(group[:count]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: -worth[g])[: choice.top_groups]
    allowed = [e for e in range(len(wanted)) if e // size in best]
    ids = sorted(allowed, key=lambda e: -wanted[e])[:top_k]
    weights = scores[ids]
    if choice.normalised:
        weights = weights / weights.sum()
    return weights * choice.scale, ids


@pytest.mark.parametrize("function", [group_routing.route_in_groups, ops.route_in_groups])
@pytest.mark.parametrize("name", CHOICES)
def test_experts_are_the_best_of_the_best_groups(name: str, function: Any) -> None:
    num_experts, top_k, choice = choice_of(name)
    logits = draw(7, 2 * num_experts)[:, :num_experts]
    bias = draw(num_experts, seed=1) / 10 if choice.scoring == "sigmoid" else None
    poison(7, top_k)

    weights, ids = function(logits, top_k, choice, bias)

    assert ids.dtype is torch.int64
    for row, found, chosen in zip(logits.double(), weights, ids.tolist(), strict=True):
        exact, expected = by_hand(row, None if bias is None else bias.double(), top_k, choice)
        assert chosen == expected
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)


def test_of_numbers_that_are_none_experts_are_chosen_that_there_are() -> None:
    num_experts, top_k, choice = choice_of("v3")
    logits = torch.full((2, num_experts), float("nan"), device=DEVICE)

    weights, ids = group_routing.route_in_groups(logits, top_k, choice, None)

    assert bool(weights.isnan().all())
    assert bool(((ids >= 0) & (ids < num_experts)).all())


def token_by_token(x: Tensor, parts: tuple[Tensor, ...], weights: Tensor, ids: Tensor) -> Tensor:
    """Return the sums in the tensors' own dtype."""
    gate_up, gate_up_bias, down, down_bias = parts
    rows = []
    for row, shares, chosen in zip(x, weights, ids.tolist(), strict=True):
        made = []
        for share, expert in zip(shares, chosen, strict=True):
            hidden = row @ gate_up[expert] + gate_up_bias[expert]
            gate, up = hidden[::2].clamp(max=1.5), hidden[1::2].clamp(-1.5, 1.5)
            hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            made.append(share * (hidden @ down[expert] + down_bias[expert]))
        rows.append(torch.stack(made).sum(0).to(x.dtype))
    return torch.stack(rows)


def kernels_alone(x: Tensor, parts: tuple[Tensor, ...], weights: Tensor, ids: Tensor) -> Tensor:
    """Return what `ops.clamped_experts` gives on a GPU."""
    activation = partial(clamped_swiglu, alpha=1.702, limit=1.5)
    made = biased_experts.experts(x, parts[:2], parts[2:], ids, activation)
    return (made * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def by_op(x: Tensor, parts: tuple[Tensor, ...], weights: Tensor, ids: Tensor) -> Tensor:
    pairs = parts[:2], parts[2:]
    return ops.clamped_experts(x, *pairs, weights, ids, alpha=1.702, limit=1.5)


@pytest.mark.parametrize("function", [kernels_alone, by_op])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 8, 3), (40, 4, 2)])
def test_sums_of_experts_with_biases_are_those_of_every_token_by_itself(
    num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, function: Any
) -> None:
    hidden, size = 24, 36
    x, scores = draw(num_tokens, hidden, dtype=dtype), draw(num_tokens, num_experts, seed=1)
    weights, ids = ops.route(scores, top_k, normalise=True)
    parts = (
        draw(num_experts, hidden, 2 * size, dtype=dtype, seed=2) / hidden**0.5,
        draw(num_experts, 2 * size, dtype=dtype, seed=3),
        draw(num_experts, size, hidden, dtype=dtype, seed=4) / size**0.5,
        draw(num_experts, hidden, dtype=dtype, seed=5),
    )
    poison(num_tokens, hidden, dtype=dtype)

    out = function(x, parts, weights, ids)

    exact = token_by_token(x.double(), tuple(p.double() for p in parts), weights.double(), ids)
    check(out, exact, token_by_token(x, parts, weights, ids))
