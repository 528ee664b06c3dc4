"""A fake attention backend that reads and checks everything that the contract hands it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from attrs import define
from torch import Tensor

from quire.interfaces.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchLimits,
    GraphSupport,
    KVLayout,
)
from quire.interfaces.batch import Batch
from quire_attention.reference.backend import ReferenceAttention


@define
class FakePlan:
    """The oracle's plan, the batch, and whether the device part was prepared."""

    inner: Any
    batch: Batch
    prepared: bool = False


class FakeAttention(AttentionBackend):
    """The oracle's maths behind a layout, a workspace, options and a fused form of its own."""

    graph_support = GraphSupport.UNIFORM
    made: ClassVar[list[FakeAttention]] = []

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Refuse what later issues bring, each by its field."""
        if spec.latent is not None:
            sizes = (spec.latent.kv_lora_rank, spec.latent.rope_head_dim)
            heads = (spec.latent.nope_head_dim, spec.latent.v_head_dim, spec.latent.plain_from)
            return f"no latent attention of {sizes} and {heads}"
        if spec.alibi or not spec.causal or spec.batch_invariant:
            return "no ALiBi, no encoders, no batch invariance"
        if spec.logit_softcap is not None and spec.sliding_window is not None:
            return f"no soft cap {spec.logit_softcap} in a window of {spec.sliding_window}"
        if spec.dtype != spec.kv_dtype or spec.device != "cpu":
            return f"no {spec.kv_dtype} cache beside {spec.dtype} on {spec.device}"
        return None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Put heads before tokens, unlike all others, in one block."""
        width = spec.head_dim + spec.value_head_dim
        shape = (spec.num_kv_heads, spec.block_size, width)
        return KVLayout(name="fake-heads-first", block_shape=shape, dtype=spec.kv_dtype)

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec, limits: BatchLimits) -> int:
        """Hold a number for each head of each sequence and token, twice if steps overlap."""
        rows = limits.max_num_seqs + limits.max_num_batched_tokens
        return 4 * spec.num_heads * rows * limits.max_steps_in_flight

    def __init__(
        self, spec: AttentionSpec, limits: BatchLimits, options: Mapping[str, Any]
    ) -> None:
        super().__init__(spec, limits, options)
        self.inner = ReferenceAttention(spec, limits, {})
        self.fuses = options["fuse"] and spec.sliding_window is not None
        self.num_steps = self.num_fused = 0
        self.made.append(self)

    def plan(self, batch: Batch, group: int) -> FakePlan:
        """Check the batch against itself: every field says the same as the others."""
        limits, mine = self.limits, batch.groups[group]
        lens = torch.tensor(batch.query_lens)
        assert batch.captured_for is GraphSupport.NONE
        assert batch.num_seqs == batch.padded_to <= limits.max_num_seqs
        assert len(batch.token_ids) == lens.sum() <= limits.max_num_batched_tokens
        assert max(batch.seq_lens_bound) <= limits.max_model_len
        assert batch.cu_seqlens_q.diff().tolist() == batch.query_lens
        assert batch.seq_lens.tolist() == batch.seq_lens_bound
        assert batch.query_lens[: batch.num_single_token_seqs].count(1) == lens.eq(1).sum()
        assert 0 <= batch.in_flight_slot <= limits.max_steps_in_flight
        assert set(batch.logit_rows.tolist()) <= set((batch.cu_seqlens_q[1:] - 1).tolist())
        assert len(set(batch.rows.tolist())) == batch.num_seqs
        owners = torch.repeat_interleave(lens)
        blocks = mine.block_table[owners, (batch.positions // self.spec.block_size).long()]
        offsets = batch.positions % self.spec.block_size
        assert torch.equal(mine.slot_mapping, blocks * self.spec.block_size + offsets)
        assert blocks.gt(0).all(), "block 0 is never allocated"
        self.num_steps += 1
        return FakePlan(self.inner.plan(batch, group), batch)

    def prepare(self, plan: FakePlan) -> None:
        """Note that it was called once, before the first layer."""
        assert not plan.prepared
        plan.prepared = True

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: FakePlan
    ) -> None:
        """Write through a view of the oracle's layout."""
        assert plan.prepared
        slots = plan.inner.slots
        blocks, offsets = slots // self.spec.block_size, slots % self.spec.block_size
        kv_cache[blocks, :, offsets] = torch.cat((k, v), dim=-1)

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: FakePlan,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Attend as the oracle does, with everything that the layer has."""
        assert kv_cache is not None
        assert (layer.sinks is not None) == self.spec.sinks
        assert layer.k_scale is None
        assert layer.v_scale is None
        assert layer.alibi_slopes is None
        assert plan.batch.plans[0].batch is plan.batch
        assert 0 <= layer.index < 2
        assert self.spec.scale == self.spec.head_dim**-0.5
        self.inner.attend(layer, q, k, v, kv_cache.transpose(1, 2), plan.inner, out, lse)

    def rotate_and_write(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        positions: Tensor,
        rotary: Any,
        qk_norm: Any,
        kv_cache: Tensor,
        plan: FakePlan,
    ) -> Tensor | None:
        """Do the three steps at once for windowed layers; the core does them for the others."""
        if not self.fuses:
            return None
        self.num_fused += 1
        spec = self.spec
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        num_qk = spec.num_heads + spec.num_kv_heads
        qk = torch.stack([_normalised(heads[:, i], i, spec, qk_norm) for i in range(num_qk)], 1)
        qk = rotary.rotate(qk, positions)
        self.write(layer, qk[:, spec.num_heads :], heads[:, num_qk:], kv_cache, plan)
        return qk[:, : spec.num_heads]


def _normalised(head: Tensor, index: int, spec: AttentionSpec, qk_norm: Any) -> Tensor:
    weight = qk_norm.q if index < spec.num_heads else qk_norm.k
    return head * (head.pow(2).mean(-1, keepdim=True) + qk_norm.eps).rsqrt() * weight
