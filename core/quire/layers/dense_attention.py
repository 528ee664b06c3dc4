"""Attention over one whole sequence as a formula, in any dtype: what backends are judged by.

In float64 it is the truth; in the model's dtype it is plain PyTorch, whose error sets the bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quire.interfaces.attention import AttentionSpec


def dense_attention(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dtype: torch.dtype,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    in_turn: bool = False,
) -> Tensor:
    """Return [num_queries, num_heads, value_head_dim] of one sequence's last queries.

    `q` [num_queries, num_heads, head_dim]; `k` and `v` [num_keys, num_kv_heads, ...] end with the
    last query's own. Keys that no query sees may be left out at the front. All is computed in
    `dtype`, on the tensors' device; the products of a score are added up as PyTorch likes, or
    `in_turn`, one after another as a kernel's loop does.
    """
    num_queries, num_keys, num_kv_heads = q.shape[0], k.shape[0], spec.num_kv_heads
    # Rows of one product are the queries of all heads that share a KV head.
    rows = q.to(dtype).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    keys = k.to(dtype).permute(1, 2, 0)
    scores = (_added_in_turn(rows, keys) if in_turn else rows @ keys) * spec.scale
    scores = scores.view(spec.num_heads, num_queries, num_keys)
    if spec.logit_softcap is not None:
        scores = torch.tanh(scores / spec.logit_softcap) * spec.logit_softcap
    queries = torch.arange(num_keys - num_queries, num_keys, device=q.device)
    distance = queries[:, None] - torch.arange(num_keys, device=q.device)
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes[:, None, None] * distance).to(dtype)
    hidden = distance < 0 if spec.causal else torch.zeros_like(distance, dtype=torch.bool)
    if spec.sliding_window is not None:
        hidden = hidden | (distance >= spec.sliding_window)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        more = sinks.to(dtype)[:, None, None].expand(-1, num_queries, 1)
        scores = torch.cat((scores, more), dim=-1)
    weights = scores.softmax(-1)[..., :num_keys].reshape(num_kv_heads, -1, num_keys)
    out = weights @ v.to(dtype).transpose(0, 1)
    return out.view(spec.num_heads, num_queries, -1).transpose(0, 1)


def _added_in_turn(rows: Tensor, keys: Tensor) -> Tensor:
    """Return `rows @ keys`, added up in float32 at least, as products of fewer bits are."""
    sums = torch.promote_types(rows.dtype, torch.float32)
    scores = rows.new_zeros(*rows.shape[:2], keys.shape[2], dtype=sums)
    for dim in range(rows.shape[2]):
        scores = scores + rows[:, :, dim, None].to(sums) * keys[:, dim, None, :].to(sums)
    return scores.to(rows.dtype)
