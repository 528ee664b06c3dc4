"""Backends with one mistake in plans, writes and numbers; `broken_backends` has those in scores."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from broken_backends import TailUnmasked, broken
from gather_attention import GatherAttention, Plan
from torch import Tensor

from quire.interfaces.attention import AttentionLayer, AttentionSpec, KVLayout
from quire.interfaces.batch import Batch
from quire.layers.attention import normalise_and_rotate


@broken("stale-plan", "stale plan")
class StalePlan(GatherAttention):
    """The first plan is kept."""

    def plan(self, batch: Batch, group: int) -> Plan:
        self.kept = getattr(self, "kept", None) or super().plan(batch, group)
        return self.kept


@broken("one-plan-for-steps-in-flight", "stale plan")
class OnePlanForStepsInFlight(GatherAttention):
    def plan(self, batch: Batch, group: int) -> Plan:
        made = super().plan(batch, group)
        self.shared = getattr(self, "shared", made)
        for field in attrs.fields(Plan):
            setattr(self.shared, field.name, getattr(made, field.name))
        return self.shared


@broken("host-length-in-a-graph", "stale")
class HostLengthInAGraph(GatherAttention):
    def plan(self, batch: Batch, group: int) -> Plan:
        made = super().plan(batch, group)
        lengths = batch.seq_lens_bound + [0] * (len(batch.seq_lens) - batch.num_seqs)
        return attrs.evolve(made, seq_lens=torch.tensor(lengths))


@broken("padding-rows-skipped", "unwritten")
class PaddingRowsSkipped(GatherAttention):
    def summed(self, layer: Any, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().summed(layer, scores, values)
        return torch.where((scores != -torch.inf).any(-1).T[..., None], out, 7.0), lse


@broken("nan-on-empty-rows", "a row of length 0 is 0/0")
class NanOnEmptyRows(GatherAttention):
    def softmax(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def sinks_of(self, layer: AttentionLayer) -> Tensor | None:
        return layer.sinks


@broken("rows-beyond-64-unwritten", "unwritten")
class LastRowUnwritten(GatherAttention):
    """The last token of a long batch."""

    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        out = tensors[5]
        kept = out[-1:].clone()
        super().attend(layer, *tensors)
        if len(out) > 16:
            out[-1:] = kept


@broken("written-to-the-next-slot")
class WrittenToTheNextSlot(GatherAttention):
    def write(self, layer: Any, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan) -> None:
        slots = (plan.slots + 1) % (len(kv_cache) * self.spec.block_size)
        super().write(layer, k, v, kv_cache, attrs.evolve(plan, slots=slots))


@broken("next-block-written-too", "wrong slot")
class NextBlockWrittenToo(GatherAttention):
    def write(self, layer: Any, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan) -> None:
        slots = (plan.slots + self.spec.block_size) % (len(kv_cache) * self.spec.block_size)
        used = torch.isin(slots // self.spec.block_size, plan.block_table)
        free = attrs.evolve(plan, slots=torch.where(used, 0, slots))
        super().write(layer, k, v, kv_cache, free)
        super().write(layer, k, v, kv_cache, plan)


@broken("next-slot-written-too", "two slots")
class NextSlotWrittenToo(GatherAttention):
    """What comes next is written over it in time, but for a step that is taken back."""

    def write(self, layer: Any, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan) -> None:
        size = self.spec.block_size
        more = torch.where(plan.slots % size == size - 1, plan.slots, plan.slots + 1)
        super().write(layer, k, v, kv_cache, attrs.evolve(plan, slots=more))
        super().write(layer, k, v, kv_cache, plan)


@broken("strides-ignored")
class StridesIgnored(GatherAttention):
    """Reads q as if it were contiguous."""

    def attend(self, layer: AttentionLayer, q: Tensor, *tensors: Any) -> None:
        heads, dim = q.shape[1:]
        strides = (heads * dim, dim, 1)
        super().attend(layer, q.as_strided(q.shape, strides, q.storage_offset()), *tensors)


@broken("q-scaled-in-place")
class QScaledInPlace(GatherAttention):
    def attend(self, layer: AttentionLayer, q: Tensor, *tensors: Any) -> None:
        super().attend(layer, q, *tensors)
        q *= self.spec.scale


@broken("block-table-changed")
class BlockTableChanged(GatherAttention):
    def plan(self, batch: Batch, group: int) -> Plan:
        made = super().plan(batch, group)
        made.block_table.clamp_(min=1)
        return made


@broken("wrong-for-one-token")
class WrongForOneToken(GatherAttention):
    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        return super().scores(q, keys) * (0.5 if len(q) == 1 else 1)


@broken("wrong-for-several-tokens")
class WrongForSeveralTokens(GatherAttention):
    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        return super().scores(q, keys) * (0.5 if len(q) > 1 else 1)


@broken("rounded-to-bfloat16-between")
class RoundedBetween(GatherAttention):
    """Sums are kept in bfloat16."""

    def summed(self, layer: Any, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().summed(layer, scores, values)
        return out.bfloat16().float(), lse


@broken("exponentials-without-the-maximum")
class ExponentialsWithoutTheMaximum(GatherAttention):
    """Overflows in float16, as exponentials of large scores do."""

    def softmax(self, scores: Tensor) -> Tensor:
        weights = scores.half().exp()
        return (weights / weights.sum(-1, keepdim=True)).float()


@broken("lse-not-written", "lse is not written")
class LseNotWritten(GatherAttention):
    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        super().attend(layer, *tensors[:6])


@broken("lse-to-base-2", "base 2")
class LseToBase2(GatherAttention):
    def summed(self, layer: Any, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().summed(layer, scores, values)
        return out, lse / 0.6931471805599453


@broken("lse-without-sinks", "sinks are not in it")
class LseWithoutSinks(GatherAttention):
    def summed(self, layer: Any, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = super().summed(layer, scores, values)
        return out, scores.logsumexp(-1).T


@broken("invariance-declared-falsely", "order of sums")
class InvarianceDeclaredFalsely(GatherAttention):
    """Rounds the last bit the other way where a sequence is not alone, as sums in another order."""

    batch_invariant = True

    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        super().attend(layer, *tensors)
        plan, out = tensors[4], tensors[5]
        if len(plan.parts) > 1:
            bits = out.view(torch.int32 if out.dtype is torch.float32 else torch.int16)
            bits ^= (bits != 0).to(bits.dtype)


@broken("nan-taken-for-zero", "the tail of the last block is not masked")
class NanTakenForZero(TailUnmasked):
    """Hides the poison in the tail, and whatever else is NaN."""

    def gathered(self, cache: Tensor, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        return super().gathered(cache.nan_to_num(), slots, visible)


@broken("nan-of-one-sequence-everywhere", "masked together")
class NanEverywhere(GatherAttention):
    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        super().attend(layer, *tensors)
        out, first = tensors[5], tensors[4].parts[0][1]
        out += 0 * out[first].sum()


@broken("cache-of-the-wrong-shape")
class CacheOfTheWrongShape(GatherAttention):
    """Says another block size than it writes."""

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        shape = (spec.block_size, spec.num_kv_heads, 2 * spec.head_dim - 1)
        return KVLayout(name="gather", block_shape=shape, dtype=spec.kv_dtype)


@broken("raises-for-odd-heads")
class RaisesForOddHeads(GatherAttention):
    """Should have said so in `why_unsupported`."""

    def head_map(self) -> Tensor:
        if self.spec.num_heads % 2:
            raise RuntimeError("the number of heads is odd")
        return super().head_map()


class FusedGather(GatherAttention):
    """Right, with a fused form in two steps."""

    def rotate_and_write(self, layer: Any, qkv: Tensor, *rest: Any) -> Tensor:
        positions, rotary, norm, kv_cache, plan = rest
        heads = qkv.unflatten(1, (-1, self.spec.head_dim))
        num_heads, split = self.spec.num_heads, self.spec.num_heads + self.spec.num_kv_heads
        qk = self.turned(heads[:, :split], positions, rotary, norm)
        self.write(layer, qk[:, num_heads:], heads[:, split:], kv_cache, plan)
        return qk[:, :num_heads]

    def turned(self, qk: Tensor, positions: Tensor, rotary: Any, norm: Any) -> Tensor:
        """Return q and k, normalised and rotated where a layer has the one and the other."""
        return normalise_and_rotate(qk, positions, rotary, norm)


@broken("fused-write-without-norm")
class FusedWriteWithoutNorm(FusedGather):
    def turned(self, qk: Tensor, positions: Tensor, rotary: Any, norm: Any) -> Tensor:
        return normalise_and_rotate(qk, positions, rotary, None)


@broken("fused-write-turned-before-norm")
class FusedWriteTurnedBeforeNorm(FusedGather):
    def turned(self, qk: Tensor, positions: Tensor, rotary: Any, norm: Any) -> Tensor:
        turned = normalise_and_rotate(qk, positions, rotary, None)
        return normalise_and_rotate(turned, positions, None, norm)


@broken("fused-write-from-position-1")
class FusedWriteFromPosition1(FusedGather):
    def turned(self, qk: Tensor, positions: Tensor, rotary: Any, norm: Any) -> Tensor:
        most = positions if rotary is None else len(rotary.cos) - 1
        return super().turned(qk, (positions + 1).clamp(max=most), rotary, norm)


@broken("fused-write-takes-a-part-for-none")
class FusedWriteOfWholeHeads(FusedGather):
    def turned(self, qk: Tensor, positions: Tensor, rotary: Any, norm: Any) -> Tensor:
        is_whole = rotary is not None and rotary.rotary_dim == rotary.head_dim
        return super().turned(qk, positions, rotary if is_whole else None, norm)


@broken("encoder-is-causal", "without a cache")
class EncoderIsCausal(GatherAttention):
    """Serves encoders, and hides later tokens from them."""

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        return super().why_unsupported(attrs.evolve(spec, causal=True))

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
        kv_cache, plan, *results = rest
        if kv_cache is None:
            num_blocks = int(plan.block_table.max()) + 1
            kv_cache = k.new_zeros(num_blocks, *self.kv_layout(self.spec).block_shape)
            self.write(layer, k, v, kv_cache, plan)
        super().attend(layer, q, k, v, kv_cache, plan, *results)
