"""Attention as the textbook writes it, in float32: gather, multiply, mask, softmax, multiply."""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from quire.interfaces.attention import (
    QUANTIZED_KV_DTYPES,
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    KVLayout,
    latent_layout,
)
from quire.interfaces.batch import Batch
from quire.layers.quantized_cache import as_bytes, dequantize, quantize

DTYPES = ("float32", "bfloat16", "float16")


@frozen(kw_only=True)
class ReferencePlan:
    """Slots of the step's tokens, and (first token, query length, length, blocks) a sequence."""

    slots: Tensor
    sequences: list[tuple[int, int, int, Tensor]]


class ReferenceAttention(AttentionBackend):
    """Serve every spec; the judge of all other backends.

    PyTorch's products of a sequence depend on how many queries they have, in the last bit. Where
    batch invariance is asked for each query has products of its own, of a shape that its position
    alone decides.
    """

    batch_invariant = True
    quantized_kv = QUANTIZED_KV_DTYPES

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Serve all but caches of unknown numbers."""
        if spec.kv_dtype not in (*DTYPES, *cls.quantized_kv):
            return f"it has no {spec.kv_dtype} KV cache"
        return None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Return [block_size, num_kv_heads, head_dim + value_head_dim]: key, then value.

        Of latents keys alone are kept.
        """
        if spec.latent is not None:
            return latent_layout(spec)
        width = spec.head_dim + spec.value_head_dim
        shape = (spec.block_size, spec.num_kv_heads, width)
        return KVLayout(name="token-head-kv", block_shape=shape, dtype=spec.kv_dtype)

    def plan(self, batch: Batch, group: int) -> ReferencePlan:
        """Cut the batch into its sequences, but those of latents that their layer serves."""
        latent = self.spec.latent
        others = set() if latent is None else set(latent.plain_rows(batch))
        tables = batch.groups[group].block_table
        sequences, first = [], 0
        lengths = zip(batch.query_lens, batch.seq_lens_bound, strict=True)
        for row, (query_len, seq_len) in enumerate(lengths):
            if row not in others:
                sequences.append((first, query_len, seq_len, tables[row]))
            first += query_len
        return ReferencePlan(slots=batch.groups[group].slot_mapping.long(), sequences=sequences)

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: ReferencePlan
    ) -> None:
        """Store each token's key and value in its slot."""
        if layer.k_scale is not None and layer.v_scale is not None:
            k = quantize(k, layer.k_scale, kv_cache.dtype)
            v = quantize(v, layer.v_scale, kv_cache.dtype)
        flat = kv_cache.view(-1, *kv_cache.shape[2:])
        if self.spec.latent is not None:
            flat[plan.slots] = k[:, 0].to(kv_cache.dtype)
            return
        kv = torch.cat((k.to(kv_cache.dtype), v.to(kv_cache.dtype)), dim=-1)
        as_bytes(flat)[plan.slots] = as_bytes(kv)

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: ReferencePlan,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Attend one sequence after another."""
        for first, query_len, seq_len, blocks in plan.sequences:
            tokens = slice(first, first + query_len)
            if kv_cache is None:
                keys, values = k[tokens], v[tokens]
            else:
                keys, values = self._gathered(layer, kv_cache, blocks, seq_len)
            for part, last in self._parts(tokens, seq_len):
                seen = slice(self._first_visible(part.stop - part.start, last), last)
                # Of its own: a product may depend on where its factors lie, too.
                queries = q[part].clone() if self.spec.batch_invariant else q[part]
                result, log_sum = self._attended(layer, queries, keys[seen], values[seen])
                out[part] = result.to(out.dtype)
                if lse is not None:
                    lse[part] = log_sum

    def _parts(self, tokens: slice, seq_len: int) -> list[tuple[slice, int]]:
        """Return which of a sequence's queries are attended at once, and how many keys there are.

        Queries of an encoder see all keys, and are always there together.
        """
        if not (self.spec.batch_invariant and self.spec.causal):
            return [(tokens, seq_len)]
        past = seq_len - (tokens.stop - tokens.start)
        return [
            (slice(t, t + 1), past + 1 + t - tokens.start) for t in range(tokens.start, tokens.stop)
        ]

    def _first_visible(self, query_len: int, seq_len: int) -> int:
        """Return the first position that a query sees; blocks before it may be someone else's."""
        window = self.spec.sliding_window
        return 0 if window is None else max(0, seq_len - query_len - window + 1)

    def _gathered(
        self, layer: AttentionLayer, kv_cache: Tensor, blocks: Tensor, seq_len: int
    ) -> tuple[Tensor, Tensor]:
        num_blocks = -(-seq_len // self.spec.block_size)
        found = as_bytes(kv_cache)[blocks[:num_blocks].long()].view(kv_cache.dtype)
        tokens = found.flatten(0, 1)[:seq_len]
        if self.spec.latent is not None:
            keys = tokens.unsqueeze(1)
            return keys, keys[..., : self.spec.value_head_dim]
        keys, values = tokens[..., : self.spec.head_dim], tokens[..., self.spec.head_dim :]
        if layer.k_scale is not None and layer.v_scale is not None:
            keys = dequantize(keys, layer.k_scale, torch.float32)
            values = dequantize(values, layer.v_scale, torch.float32)
        return keys, values

    def _attended(self, layer: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return [queries, heads, value_head_dim] and the log-sum-exp [queries, heads]."""
        spec = self.spec
        group_size = spec.num_heads // spec.num_kv_heads
        k = k.float().repeat_interleave(group_size, dim=1)
        v = v.float().repeat_interleave(group_size, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * spec.scale
        if spec.logit_softcap is not None:
            scores = spec.logit_softcap * torch.tanh(scores / spec.logit_softcap)
        distance = _distances(q.shape[0], k.shape[0], q.device)
        if layer.alibi_slopes is not None:
            scores = scores - layer.alibi_slopes[:, None, None] * distance
        scores = scores.masked_fill(~self._visible(distance), float("-inf"))
        if layer.sinks is not None:
            sinks = layer.sinks.float()[:, None, None].expand(-1, q.shape[0], 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : k.shape[0]]
        log_sum = torch.logsumexp(scores, dim=-1).transpose(0, 1)
        return torch.einsum("hqk,khd->qhd", weights, v), log_sum

    def _visible(self, distance: Tensor) -> Tensor:
        visible = torch.ones_like(distance, dtype=torch.bool)
        if self.spec.causal:
            visible = distance >= 0
        if self.spec.sliding_window is not None:
            visible = visible & (distance < self.spec.sliding_window)
        return visible


def _distances(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return position of query minus position of key; the last query is the last key."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)
    return queries[:, None] - torch.arange(num_keys, device=device)[None, :]
