"""Attention over whole sequences as a formula, in any dtype, and the bound of design.md."""

from __future__ import annotations

import torch
from attention_cases import Case, Inputs
from torch import Tensor

# Scores whose rounding is looked at, at least, before an error counts as usual or not.
NUM_SAMPLES = 512


def scores_of(case: Case, inputs: Inputs, i: int, dtype: torch.dtype) -> Tensor:
    """Return the masked scores [heads, queries, keys] of sequence i."""
    spec, (query_len, seq_len) = case.spec, case.lengths[i]
    group = spec.num_heads // spec.num_kv_heads
    q, k = inputs.q[i].to(dtype), inputs.k[i].to(dtype)
    heads = [(q[:, h] @ k[:, h // group].T) * spec.scale for h in range(spec.num_heads)]
    scores = torch.stack(heads)
    if spec.logit_softcap is not None:
        scores = torch.tanh(scores / spec.logit_softcap) * spec.logit_softcap
    for row in range(query_len):
        position = seq_len - query_len + row
        last = position if spec.causal else seq_len - 1
        first = 0 if spec.sliding_window is None else position - spec.sliding_window + 1
        scores[:, row, last + 1 :] = float("-inf")
        scores[:, row, : max(0, first)] = float("-inf")
    return scores


def attention(case: Case, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Return [queries, heads, value_head_dim] of each sequence, computed in `dtype`."""
    spec = case.spec
    group = spec.num_heads // spec.num_kv_heads
    found = []
    for i, (_, seq_len) in enumerate(case.lengths):
        scores = scores_of(case, inputs, i, dtype)
        if inputs.sinks is not None:
            sinks = inputs.sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., :seq_len]
        v = inputs.v[i].to(dtype)
        heads = [weights[h] @ v[:, h // group] for h in range(spec.num_heads)]
        found.append(torch.stack(heads, dim=1))
    return found


def plain_error(case: Case, inputs: Inputs, exact: list[Tensor]) -> float:
    """Return the worst error of plain PyTorch in the case's dtype.

    A small case may come out better than the dtype promises by luck, so it is computed with the
    head dimensions in several orders, which changes the rounding and nothing else.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.spec.dtype)
    worst = 0.0
    num_scores = sum(query_len for query_len, _ in case.lengths) * case.spec.num_heads
    for _ in range(max(3, NUM_SAMPLES // num_scores)):
        order = torch.randperm(case.spec.head_dim, generator=generator)
        turned = Inputs(
            q=[q[..., order] for q in inputs.q],
            k=[k[..., order] for k in inputs.k],
            v=inputs.v,
            sinks=inputs.sinks,
        )
        worst = max(worst, largest_error(attention(case, turned, dtype), exact))
    return worst


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest absolute difference, NaN if there is a NaN."""
    differences = [(f.double() - e).abs().flatten() for f, e in zip(found, exact, strict=True)]
    return torch.cat(differences).max().item()


def check_within_bound(case: Case, inputs: Inputs, out: list[Tensor]) -> None:
    """Fail unless the error is at most twice plain PyTorch's, plus one rounding unit."""
    exact = attention(case, inputs, torch.float64)
    unit = torch.finfo(getattr(torch, case.spec.dtype)).eps
    magnitude = max(e.abs().max().item() for e in exact)
    allowed = 2 * plain_error(case, inputs, exact) + unit * magnitude
    error = largest_error(out, exact)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g} in {case}"
