"""Attention over a paged KV cache, tile by tile, with a running softmax.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from attrs import frozen
from torch import Tensor

from quire.interfaces.attention import AttentionBackend, AttentionLayer, AttentionSpec, KVLayout
from quire.interfaces.batch import Batch


@frozen(kw_only=True)
class Plan:
    """What all layers of a step share; made once a step, from the batch alone."""

    slots: Tensor  # int64 [num_tokens]: where the step's tokens are stored
    positions: Tensor  # int32 [num_tokens]
    block_table: Tensor  # int32 [num_seqs, max_blocks]
    sequences: list[tuple[slice, int]]  # its tokens in the batch, its length


class TiledAttention(AttentionBackend):
    """Grouped-query, causal attention in float32."""

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Say what is missing: the core never has to guess."""
        missing = {
            "latent attention": spec.latent is not None,
            "encoders": not spec.causal,
            "a sliding window": spec.sliding_window is not None,
            "a soft cap": spec.logit_softcap is not None,
            "sinks": spec.sinks,
            "ALiBi": spec.alibi,
            "values of another size than keys": spec.value_head_dim != spec.head_dim,
            f"a KV cache of {spec.kv_dtype}": spec.kv_dtype != spec.dtype,
        }
        return next(
            (f"it does not know {what}" for what, is_asked in missing.items() if is_asked), None
        )

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Keep a block's keys together, then its values."""
        shape = (2, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return KVLayout(name="example", block_shape=shape, dtype=spec.kv_dtype)

    def plan(self, batch: Batch, group: int) -> Plan:
        """Note where each sequence lies in the batch and how long it is."""
        ends = [sum(batch.query_lens[:row]) for row in range(batch.num_seqs + 1)]
        spans = [slice(first, last) for first, last in pairwise(ends)]
        return Plan(
            slots=batch.groups[group].slot_mapping.long(),
            positions=batch.positions,
            block_table=batch.groups[group].block_table,
            sequences=list(zip(spans, batch.seq_lens_bound, strict=True)),
        )

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan
    ) -> None:
        """Store each token's key and value in its slot."""
        blocks, offsets = plan.slots // self.spec.block_size, plan.slots % self.spec.block_size
        kv_cache[blocks, 0, offsets] = k
        kv_cache[blocks, 1, offsets] = v

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: Plan,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Attend one sequence after another; its own new keys are in the cache already."""
        assert kv_cache is not None, "why_unsupported refuses encoders"
        for row, (span, length) in enumerate(plan.sequences):
            table = plan.block_table[row].long()
            found, log_sum = self._attended(q[span], plan.positions[span], kv_cache, table, length)
            out[span] = found.to(out.dtype)
            if lse is not None:
                lse[span] = log_sum

    def _attended(
        self, q: Tensor, positions: Tensor, kv_cache: Tensor, table: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return [num_queries, num_heads, head_dim] and the log-sum-exp of the scores."""
        spec = self.spec
        # [num_kv_heads, heads that share them, num_queries, head_dim]
        q = q.float().unflatten(1, (spec.num_kv_heads, -1)).permute(1, 2, 0, 3) * spec.scale
        best = q.new_full((*q.shape[:3], 1), float("-inf"))
        total, weighted = torch.zeros_like(best), torch.zeros_like(q)
        for first in range(0, length, self.options["tile"]):
            last = min(first + self.options["tile"], length)
            at = torch.arange(first, last, device=q.device)
            tile = kv_cache[table[at // spec.block_size], :, at % spec.block_size].float()
            keys, values = tile.permute(1, 2, 0, 3)[:, :, None]  # each [num_kv_heads, 1, tile, dim]
            scores = q @ keys.mT
            scores = scores.masked_fill(at > positions[:, None], float("-inf"))
            # What was summed so far is scaled to the new maximum. Key 0 is visible to everyone, so
            # the maximum is finite from the first tile on.
            new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
            weights, shrink = torch.exp(scores - new_best), torch.exp(best - new_best)
            total = total * shrink + weights.sum(-1, keepdim=True)
            weighted = weighted * shrink + weights @ values
            best = new_best
        attended = (weighted / total).permute(2, 0, 1, 3).flatten(1, 2)
        return attended, (best + total.log()).permute(2, 0, 1, 3).flatten(1)
