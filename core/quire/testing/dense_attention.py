"""The attention backend of the kit's model checks: plain, one sequence after another."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.interfaces.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchLimits,
    KVLayout,
    latent_layout,
)
from quire.interfaces.batch import Batch

LIMITS = BatchLimits(max_num_seqs=16, max_num_batched_tokens=4096, max_model_len=4096)


class DenseAttention(AttentionBackend):
    """Attention with scores written out, in float64 for a float64 model, else in float32."""

    batch_invariant = True

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Serve everything."""
        return None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Keep a block's keys together, then its values; of latents keys alone."""
        if spec.latent is not None:
            return latent_layout(spec)
        shape = (2, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return KVLayout(name="dense", block_shape=shape, dtype=spec.kv_dtype)

    def plan(self, batch: Batch, group: int) -> Batch:
        """Plan nothing: the batch says it all."""
        return batch

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Batch
    ) -> None:
        """Store each token's key and value in its slot."""
        slots = plan.groups[0].slot_mapping.long()
        at = slots // self.spec.block_size, slots % self.spec.block_size
        if self.spec.latent is not None:
            kv_cache[at] = k[:, 0]
            return
        kv_cache[at[0], 0, at[1]], kv_cache[at[0], 1, at[1]] = k, v

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: Batch,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Attend one sequence after another."""
        first = 0
        for row, (query_len, seq_len) in enumerate(
            zip(plan.query_lens, plan.seq_lens_bound, strict=True)
        ):
            part = slice(first, first + query_len)
            first += query_len
            keys, values = k[part], v[part]
            if kv_cache is not None:
                at = torch.arange(seq_len, device=q.device)
                blocks = plan.groups[0].block_table[row].long()[at // self.spec.block_size]
                keys, values = self._kept(kv_cache, blocks, at % self.spec.block_size)
            parts = [(part, len(keys))]
            if self.spec.batch_invariant and kv_cache is not None:
                # One query after another, each with its own keys and nothing else.
                past = seq_len - query_len - part.start
                parts = [(slice(t, t + 1), past + t + 1) for t in range(part.start, part.stop)]
            for own, count in parts:
                found = self._attended(
                    layer, q[own].clone(), keys[:count], values[:count], plan.positions[own]
                )
                out[own] = found.to(out.dtype)

    def _kept(self, kv_cache: Tensor, blocks: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.latent is None:
            keys, values = kv_cache[blocks, :, at].unbind(1)
            return keys, values
        keys = kv_cache[blocks, at].unsqueeze(1)
        return keys, keys[..., : self.spec.value_head_dim]

    def _attended(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor
    ) -> Tensor:
        """Return [queries, num_heads, head_dim] of one sequence."""
        spec = self.spec
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        group = spec.num_heads // spec.num_kv_heads
        k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.to(dtype), k) * spec.scale
        if spec.logit_softcap is not None:
            scores = torch.tanh(scores / spec.logit_softcap) * spec.logit_softcap
        # Without a cache an encoder sees its own tokens, and all of them.
        distance = positions[:, None] - torch.arange(len(k), device=q.device)
        if layer.alibi_slopes is not None:
            scores = scores - layer.alibi_slopes[:, None, None] * distance
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if spec.causal:
            hidden |= distance < 0
        if spec.sliding_window is not None:
            hidden |= distance >= spec.sliding_window
        scores = scores.masked_fill(hidden, -torch.inf)
        if layer.sinks is not None:
            sinks = layer.sinks.to(dtype)[:, None, None].expand(*scores.shape[:2], 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1)[..., : len(k)]
        return torch.einsum("hqk,khd->qhd", weights, v)
