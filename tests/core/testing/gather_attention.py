"""A right and simple attention backend in small steps, each of which a broken one replaces."""

from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

from quire.interfaces.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    GraphSupport,
    KVLayout,
)
from quire.interfaces.batch import Batch


@define(kw_only=True)
class Plan:
    """Views of the batch, and (row, its tokens) of each sequence; lengths are the device's."""

    block_table: Tensor
    slots: Tensor
    seq_lens: Tensor
    positions: Tensor
    parts: list[tuple[int, slice]]


class GatherAttention(AttentionBackend):
    """Gather a sequence's blocks, hide what is not visible, softmax, sum."""

    graph_support = GraphSupport.SINGLE_TOKEN

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Serve all but latent attention, encoders and ALiBi."""
        if spec.latent is not None or not spec.causal or spec.alibi:
            return "it has no latent attention, encoders and ALiBi"
        return None if spec.kv_dtype == spec.dtype else "its cache has the model's dtype"

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Return [block_size, num_kv_heads, head_dim + value_head_dim]."""
        shape = (spec.block_size, spec.num_kv_heads, spec.head_dim + spec.value_head_dim)
        return KVLayout(name="gather", block_shape=shape, dtype=spec.kv_dtype)

    def plan(self, batch: Batch, group: int) -> Plan:
        """Cut the batch into its sequences."""
        own = batch.groups[group]
        query_lens = batch.query_lens
        if batch.num_single_token_seqs == batch.num_seqs:
            query_lens = [1] * batch.seq_lens.shape[0]
        parts, first = [], 0
        for row, query_len in enumerate(query_lens):
            parts.append((row, slice(first, first + query_len)))
            first += query_len
        return Plan(
            block_table=own.block_table,
            slots=own.slot_mapping,
            seq_lens=batch.seq_lens,
            positions=batch.positions,
            parts=parts,
        )

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan
    ) -> None:
        """Store each token in its slot."""
        kv_cache.flatten(0, 1)[plan.slots.long()] = torch.cat((k, v), dim=-1)

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
        """Attend one sequence after another."""
        assert kv_cache is not None
        for row, tokens in plan.parts:
            positions, length = plan.positions[tokens].long(), plan.seq_lens[row].long()
            slots = self.slots_of(plan, row)
            visible = self.visible(positions, torch.arange(len(slots)), length)
            keys, values = self.gathered(kv_cache, slots, visible)
            scores = self.scores(q[tokens], keys).masked_fill(~visible[None], -torch.inf)
            result, log_sum = self.summed(layer, scores, values)
            out[tokens] = result.to(out.dtype)
            if lse is not None:
                lse[tokens] = log_sum

    def slots_of(self, plan: Plan, row: int) -> Tensor:
        """Return the slot of each position of a row of the block table."""
        size = self.spec.block_size
        positions = torch.arange(plan.block_table.shape[1] * size)
        return plan.block_table[row].long()[positions // size] * size + positions % size

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        """Return [queries, keys]: what each query sees."""
        distance = positions[:, None] - keys
        found = (distance >= 0) & (keys < length)
        if self.spec.sliding_window is not None:
            found &= distance < self.spec.sliding_window
        return found

    def gathered(self, cache: Tensor, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [num_heads, keys, dim], zero where no query sees them."""
        tokens = cache.flatten(0, 1)[slots]
        tokens = torch.where(visible.any(0)[:, None, None], tokens, 0).float()
        tokens = tokens[:, self.head_map()].transpose(0, 1)
        return tokens[..., : self.spec.head_dim], tokens[..., self.spec.head_dim :]

    def head_map(self) -> Tensor:
        """Return the KV head of each head."""
        spec = self.spec
        return torch.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """Return [heads, queries, keys]."""
        return self.capped(q.float().transpose(0, 1) @ keys.mT * self.spec.scale)

    def capped(self, scores: Tensor) -> Tensor:
        """Return the scores below the soft cap."""
        cap = self.spec.logit_softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def sinks_of(self, layer: AttentionLayer) -> Tensor | None:
        """Return the sinks [num_heads]."""
        return layer.sinks

    def summed(
        self, layer: AttentionLayer, scores: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return outputs [queries, heads, dim], zero where nothing is seen, and lse."""
        num_keys, sinks = scores.shape[-1], self.sinks_of(layer)
        if sinks is not None:
            more = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, more), dim=-1)
        weights = self.softmax(scores)[..., :num_keys]
        return (weights @ values).transpose(0, 1), scores.logsumexp(-1).T

    def softmax(self, scores: Tensor) -> Tensor:
        """Return weights, zero in rows that see nothing."""
        return scores.softmax(-1).nan_to_num(0.0)
