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
) -> Tensor:
    """Return [num_queries, num_heads, value_head_dim] of one sequence's last queries.

    `q` [num_queries, num_heads, head_dim]; `k` and `v` [num_keys, num_kv_heads, ...] end with the
    last query's own. Keys that no query sees may be left out at the front. All is computed in
    `dtype`, on the tensors' device.
    """
    products = dense_products(spec, q, k, dtype=dtype)
    return dense_sums(spec, products, v, sinks=sinks, alibi_slopes=alibi_slopes)


def dense_products(
    spec: AttentionSpec, q: Tensor, k: Tensor, *, dtype: torch.dtype, in_turn: bool = False
) -> Tensor:
    """Return the products of queries and keys [num_heads, num_queries, num_keys], not scaled.

    What makes one of them is added up as PyTorch likes, or `in_turn`, as a kernel's loop does.
    """
    # Rows of one product are the queries of all heads that share a KV head.
    rows = q.to(dtype).unflatten(1, (spec.num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    keys = k.to(dtype).permute(1, 2, 0)
    products = _added_in_turn(rows, keys) if in_turn else rows @ keys
    return products.view(spec.num_heads, q.shape[0], k.shape[0])


def _added_in_turn(rows: Tensor, keys: Tensor) -> Tensor:
    """Return `rows @ keys`, added up in float32 at least, as products of fewer bits are."""
    sums = torch.promote_types(rows.dtype, torch.float32)
    products = rows.new_zeros(*rows.shape[:2], keys.shape[2], dtype=sums)
    for dim in range(rows.shape[2]):
        products = products + rows[:, :, dim, None].to(sums) * keys[:, dim, None, :].to(sums)
    return products.to(rows.dtype)


def dense_sums(
    spec: AttentionSpec,
    products: Tensor,
    v: Tensor,
    *,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Return what attention makes of the products, as `dense_attention` does, in their dtype."""
    num_queries, num_keys = products.shape[1:]
    scores = products * spec.scale
    if spec.logit_softcap is not None:
        scores = torch.tanh(scores / spec.logit_softcap) * spec.logit_softcap
    queries = torch.arange(num_keys - num_queries, num_keys, device=scores.device)
    distance = queries[:, None] - torch.arange(num_keys, device=scores.device)
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes[:, None, None] * distance).to(scores.dtype)
    hidden = distance < 0 if spec.causal else torch.zeros_like(distance, dtype=torch.bool)
    if spec.sliding_window is not None:
        hidden = hidden | (distance >= spec.sliding_window)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        more = sinks.to(scores.dtype)[:, None, None].expand(-1, num_queries, 1)
        scores = torch.cat((scores, more), dim=-1)
    weights = scores.softmax(-1)[..., :num_keys].reshape(spec.num_kv_heads, -1, num_keys)
    out = weights @ v.to(scores.dtype).transpose(0, 1)
    return out.view(spec.num_heads, num_queries, -1).transpose(0, 1)
