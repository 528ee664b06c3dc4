"""Backends with one mistake each in what they keep, where, and how far it reaches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from broken_backends import broken
from gather_attention import GatherAttention, Plan
from torch import Tensor

from quire.interfaces.attention import AttentionLayer, AttentionSpec
from quire.interfaces.batch import Batch


@broken("stride-of-keys-for-values", "the strides of q, k or v")
class StrideOfKeysForValues(GatherAttention):
    """Where values are as wide as keys."""

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        if spec.head_dim != spec.value_head_dim:
            return "values are as wide as keys"
        return super().why_unsupported(spec)

    def write(self, layer: Any, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan) -> None:
        same = v.as_strided(v.shape, k.stride(), v.storage_offset())
        super().write(layer, k, same, kv_cache, plan)


@broken("kept-beside-the-cache", "outside of the cache")
class KeptBesideTheCache(GatherAttention):
    """By block, in the instance: a copy of a block is without it."""

    def write(self, layer: Any, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan) -> None:
        super().write(layer, k, v, kv_cache, plan)
        self.own = getattr(self, "own", {})
        beside = self.own.setdefault(kv_cache.data_ptr(), torch.zeros_like(kv_cache))
        super().write(layer, k, v, beside, plan)

    def gathered(self, cache: Tensor, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        return super().gathered(self.own[cache.data_ptr()], slots, visible)


@broken("plans-of-the-class", "what one instance plans")
class PlansOfTheClass(GatherAttention):
    plans: ClassVar[dict[int, Plan]] = {}

    def plan(self, batch: Batch, group: int) -> Any:
        self.plans[batch.in_flight_slot] = super().plan(batch, group)
        return batch.in_flight_slot

    def write(self, *tensors: Any) -> None:
        super().write(*tensors[:4], self.plans[tensors[4]])

    def attend(self, *tensors: Any) -> None:
        super().attend(*tensors[:5], self.plans[tensors[5]], *tensors[6:])


@broken("host-lists-cleared", "batch.query_lens")
class HostListsCleared(GatherAttention):
    def plan(self, batch: Batch, group: int) -> Plan:
        made = super().plan(batch, group)
        batch.query_lens.clear()
        return made


@broken("slot-behind-a-chunk-written", "two slots")
class SlotBehindAChunkWritten(GatherAttention):
    def write(self, layer: Any, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan) -> None:
        for _, tokens in plan.parts:
            last = int(plan.slots[tokens.stop - 1]) if tokens.stop <= len(plan.slots) else 0
            if tokens.stop - tokens.start > 1 and (last + 1) % self.spec.block_size:
                kv_cache.flatten(0, 1)[last + 1] = 5.0
        super().write(layer, k, v, kv_cache, plan)


@broken("nan-of-the-output-cleared", "NaN is taken for zero")
class NanOfTheOutputCleared(GatherAttention):
    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        super().attend(layer, *tensors)
        tensors[5].nan_to_num_(0.0)


@broken("workspace-in-words", "a number of bytes")
class WorkspaceInWords(GatherAttention):
    @classmethod
    def workspace_bytes(cls, *_: Any) -> Any:
        return "little"


@broken("last-row-of-a-full-batch")
class LastRowOfAFullBatch(GatherAttention):
    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        super().attend(layer, *tensors)
        if len(tensors[4].parts) == self.limits.max_num_seqs:
            tensors[5][-1] = 0


@broken("heads-beyond-32")
class HeadsBeyond32(GatherAttention):
    def head_map(self) -> Tensor:
        return torch.cat((super().head_map()[:32], torch.zeros(100).long()))[: self.spec.num_heads]


@broken("windows-beyond-64-ignored", "the window is ignored")
class WindowsBeyond64Ignored(GatherAttention):
    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        if (self.spec.sliding_window or 0) <= 64:
            return super().visible(positions, keys, length)
        return (positions[:, None] >= keys) & (keys < length)


@broken("capture-serves-256-keys", "stale")
class CaptureServes256Keys(GatherAttention):
    most = 2**31

    def plan(self, batch: Batch, group: int) -> Plan:
        self.most = self.most if batch.query_lens else 256
        return super().plan(batch, group)

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        return super().visible(positions, keys, length) & (keys < self.most)


@broken("lse-of-the-last-split")
class LseOfTheLastSplit(GatherAttention):
    def summed(self, layer: Any, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().summed(layer, scores, values)
        split = scores[..., 256:] if scores.shape[-1] > 256 else None
        return out, lse if split is None else split.logsumexp(-1).T


@broken("chunk-beyond-a-tile-of-64")
class ChunkBeyondATile(GatherAttention):
    """Keys that the second tile of queries sees begin at the past's last whole tile."""

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        found = super().visible(positions, keys, length)
        past = int(positions[0])
        if len(positions) > 64 and past % 64:
            found[:64] &= keys < past // 64 * 64 + 64
        return found
