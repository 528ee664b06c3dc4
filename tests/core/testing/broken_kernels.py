"""Backends with one mistake each of the kind that tiles, splits and addresses bring with them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import attrs
import torch
from attrs import define
from broken_backends import broken
from gather_attention import GatherAttention, Plan
from torch import Tensor

from quire.interfaces.attention import AttentionLayer, AttentionSpec, GraphSupport
from quire.interfaces.batch import Batch

TILE = 16


@broken("scale-of-the-padded-head-size")
class ScaleOfThePaddedHeadSize(GatherAttention):
    """Right for powers of two."""

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        dim = self.spec.head_dim
        padded = 1 << (dim - 1).bit_length()
        scale = self.spec.scale * (dim / padded) ** 0.5
        return self.capped(q.float().transpose(0, 1) @ keys.mT * scale)


@broken("padded-dimensions-read")
class PaddedDimensionsRead(GatherAttention):
    """A tile is as wide as the next power of two: what follows a key in memory counts too."""

    def gathered(self, cache: Tensor, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().gathered(cache, slots, visible)
        dim = self.spec.head_dim
        more = min((1 << (dim - 1).bit_length()) - dim, values.shape[-1])
        return keys + 0.01 * values[..., :more].sum(-1, keepdim=True), values


@broken("values-of-the-keys-width")
class ValuesOfTheKeysWidth(GatherAttention):
    def gathered(self, cache: Tensor, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().gathered(cache, slots, visible)
        return keys, values if values.shape[-1] <= keys.shape[-1] else values.roll(1, -1)


@broken("softcap-of-hidden-scores")
class SoftcapOfHiddenScores(GatherAttention):
    """cap * tanh(-inf / cap) is -cap: hidden keys are seen a little."""

    def softmax(self, scores: Tensor) -> Tensor:
        cap = self.spec.logit_softcap
        return super().softmax(scores if cap is None else scores.clamp(min=-cap))


@broken("sinks-of-each-tile")
class SinksOfEachTile(GatherAttention):
    """Each split of the keys adds them to its sum."""

    def softmax(self, scores: Tensor) -> Tensor:
        tiles = -(-scores.shape[-1] // TILE)
        if self.spec.sinks and tiles > 1:
            scores = torch.cat((scores, scores[..., -1:].expand(*scores.shape[:-1], tiles)), -1)
        return super().softmax(scores)


@broken("sinks-of-the-kv-head")
class SinksOfTheKVHead(GatherAttention):
    def sinks_of(self, layer: AttentionLayer) -> Tensor | None:
        return None if layer.sinks is None else layer.sinks[self.head_map()]


@broken("window-from-a-block-edge")
class WindowFromABlockEdge(GatherAttention):
    """Whole blocks are skipped, and the first one is not masked."""

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        found = (positions[:, None] >= keys) & (keys < length)
        window, size = self.spec.sliding_window, self.spec.block_size
        if window is not None:
            first = (positions - window + 1).clamp(min=0) // size * size
            found &= keys >= first[:, None]
        return found


@broken("table-as-wide-as-the-longest", "the width of the block table is guessed")
class TableAsWideAsTheLongest(GatherAttention):
    """Rows of the block table are taken to be as long as the longest sequence needs."""

    def plan(self, batch: Batch, group: int) -> Plan:
        made = super().plan(batch, group)
        if not batch.seq_lens_bound:
            return made
        rows, size = len(made.block_table), self.spec.block_size
        width = -(-max(batch.seq_lens_bound) // size)
        return attrs.evolve(
            made, block_table=made.block_table.as_strided((rows, width), (width, 1))
        )


@broken("first-group-of-the-batch", "the tensors of another group")
class FirstGroupOfTheBatch(GatherAttention):
    """Right for models whose layers are all alike."""

    def plan(self, batch: Batch, group: int) -> Plan:
        return super().plan(batch, 0)


@broken("tile-behind-the-last-row", "the rest of a tile is stored")
class TileBehindTheLastRow(GatherAttention):
    """The rest of the last tile is stored too."""

    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        super().attend(layer, *tensors)
        out = tensors[5]
        rows = -(-len(out) // TILE) * TILE
        beyond = out.as_strided((rows, *out.shape[1:]), out.stride())
        beyond[len(out) :] = 0


@broken("tile-over-the-next-sequence")
class TileOverTheNextSequence(GatherAttention):
    """The rest of a tile is stored over what another program wrote."""

    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        super().attend(layer, *tensors)
        plan, out = tensors[4], tensors[5]
        for _, tokens in plan.parts[:-1]:
            if (tokens.stop - tokens.start) % 4 == 1 and tokens.stop - tokens.start > 1:
                out[tokens.stop] = 0


@broken("second-tile-of-queries-from-the-start")
class SecondTileOfQueriesFromTheStart(GatherAttention):
    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        return super().visible(positions[torch.arange(len(positions)) % TILE], keys, length)


@broken("strides-of-keys-ignored", "the strides of q, k or v are ignored")
class StridesOfKeysIgnored(GatherAttention):
    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan
    ) -> None:
        heads, dim = k.shape[1:]
        k = k.as_strided(k.shape, (heads * dim, dim, 1), k.storage_offset())
        super().write(layer, k, v, kv_cache, plan)


@broken("shared-blocks-read-once", "blocks that sequences share")
class SharedBlocksReadOnce(GatherAttention):
    """A block is given to the first sequence that names it."""

    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        self.taken: set[int] = set()
        super().attend(layer, *tensors)

    def slots_of(self, plan: Plan, row: int) -> Tensor:
        slots = super().slots_of(plan, row)
        size = self.spec.block_size
        blocks = plan.block_table[row, : -(-int(plan.seq_lens[row]) // size)].tolist()
        again = [block for block in blocks if block in self.taken]
        self.taken.update(blocks)
        return torch.where(torch.isin(slots // size, torch.tensor(again)), 0, slots)


@broken("tensor-float-32")
class TensorFloat32(GatherAttention):
    """Products of float32 with 10 bits of mantissa."""

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        q, keys = (self.short(x.float()) for x in (q, keys))
        return super().scores(q, keys)

    def short(self, x: Tensor) -> Tensor:
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@broken("sums-in-half-precision")
class SumsInHalfPrecision(GatherAttention):
    """The accumulator has the dtype of the output."""

    def summed(
        self, layer: AttentionLayer, scores: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, lse = super().summed(layer, scores, values)
        num_keys, sinks = scores.shape[-1], self.sinks_of(layer)
        if sinks is not None:
            more = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, more), dim=-1)
        weights, dtype = self.softmax(scores)[..., :num_keys], getattr(torch, self.spec.dtype)
        total = torch.zeros(())
        for key in range(num_keys):
            part = weights[..., key, None] * values[:, key, None]
            total = (total + part).to(dtype).float()
        return total.transpose(0, 1), lse


@broken("maximum-from-zero", "does not begin at -inf")
class MaximumFromZero(GatherAttention):
    """The running maximum begins at 0, not at -inf."""

    def softmax(self, scores: Tensor) -> Tensor:
        most = scores.amax(-1, keepdim=True).clamp(min=0.0)
        weights = (scores - most).exp()
        return (weights / weights.sum(-1, keepdim=True)).nan_to_num(0.0)


@broken("single-precision-exponentials-without-the-maximum", "is not taken off")
class SingleExponentialsWithoutTheMaximum(GatherAttention):
    """Right while scores are small."""

    def softmax(self, scores: Tensor) -> Tensor:
        weights = scores.exp()
        return (weights / weights.sum(-1, keepdim=True)).nan_to_num(0.0)


@broken("second-split-forgotten")
class SecondSplitForgotten(GatherAttention):
    """Keys from 512 on; short contexts have one split."""

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        found = super().visible(positions, keys, length)
        return found & ((keys < 512) | (keys == positions[:, None]))


@broken("more-sequences-than-a-warp")
class MoreSequencesThanAWarp(GatherAttention):
    """The sequences of a plan are numbered by one warp."""

    def plan(self, batch: Batch, group: int) -> Plan:
        made = super().plan(batch, group)
        parts = [(row % 32, tokens) for row, tokens in made.parts]
        return attrs.evolve(made, parts=parts)


@broken("offsets-of-32-bits", "of 32 bits")
class OffsetsOf32Bits(GatherAttention):
    """Right while a cache has less than 2**31 numbers."""

    def slots_of(self, plan: Plan, row: int) -> Tensor:
        slots = super().slots_of(plan, row)
        width = self.spec.num_kv_heads * (self.spec.head_dim + self.spec.value_head_dim)
        return (slots * width).int().long() // width


@broken("plan-kept-by-its-sizes", "stale plan")
class PlanKeptByItsSizes(GatherAttention):
    def plan(self, batch: Batch, group: int) -> Plan:
        self.kept: dict[Any, Plan] = getattr(self, "kept", {})
        key = tuple(batch.query_lens), batch.padded_to
        return self.kept.setdefault(key, super().plan(batch, group))


@define(kw_only=True)
class BoundedPlan(Plan):
    """Also the longest length when it was made."""

    most: int


@broken("longest-length-of-the-capture", "stale")
class LongestLengthOfTheCapture(GatherAttention):
    """A graph keeps the grid that it was launched with."""

    def plan(self, batch: Batch, group: int) -> BoundedPlan:
        made = super().plan(batch, group)
        return BoundedPlan(
            **attrs.asdict(made, recurse=False), most=max(batch.seq_lens_bound, default=8)
        )

    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        self.most = tensors[4].most
        super().attend(layer, *tensors)

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        return super().visible(positions, keys, length.clamp(max=self.most))


@broken("sums-kept-between-replays")
class SumsKeptBetweenReplays(GatherAttention):
    """What splits add up in is cleared by the plan, which a graph does not repeat."""

    def plan(self, batch: Batch, group: int) -> Plan:
        self.left: Tensor | None = None
        return super().plan(batch, group)

    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        super().attend(layer, *tensors)
        out = tensors[5]
        if self.left is not None and self.left.shape == out.shape:
            out += self.left
        self.left = out.clone()


@broken("empty-rows-see-one-token", "a row of length 0")
class EmptyRowsSeeOneToken(GatherAttention):
    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        return super().visible(positions, keys, length.clamp(min=1))


@define(kw_only=True)
class AnyPlan(Plan):
    """Also where sequences begin, which is read when the step runs."""

    starts: Tensor


class AnyStep(GatherAttention):
    """Right, and any step may be captured."""

    graph_support = GraphSupport.ANY

    def plan(self, batch: Batch, group: int) -> AnyPlan:
        made = super().plan(batch, group)
        values = attrs.asdict(made, recurse=False)
        return AnyPlan(**values, starts=batch.cu_seqlens_q)

    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        plan = tensors[4]
        starts = self.starts_of(plan)
        spans = pairwise(starts)
        parts = [(row, slice(*span)) for row, span in enumerate(spans) if span[0] < span[1]]
        super().attend(layer, *tensors[:4], attrs.evolve(plan, parts=parts), *tensors[5:])

    def starts_of(self, plan: AnyPlan) -> list[int]:
        """Return where sequences begin, and where the last one ends."""
        return plan.starts.tolist()


@broken("single-tokens-in-a-mixed-graph")
class SingleTokensInAMixedGraph(AnyStep):
    """Takes the captured step for one of single tokens."""

    def starts_of(self, plan: AnyPlan) -> list[int]:
        return list(range(len(plan.starts)))


@broken("padding-tokens-written", "the number of tiles")
class PaddingTokensWritten(AnyStep):
    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        super().attend(layer, *tensors)
        plan, out = tensors[4], tensors[5]
        out[int(plan.starts[-1]) :] = 0


class Alibi(GatherAttention):
    """Right, with ALiBi."""

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        return super().why_unsupported(attrs.evolve(spec, alibi=False))

    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        self.slopes = layer.alibi_slopes
        super().attend(layer, *tensors)

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        self.distance = positions[:, None] - keys
        return super().visible(positions, keys, length)

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        found = super().scores(q, keys)
        return found if self.slopes is None else found - self.bias()

    def bias(self) -> Tensor:
        """Return what is taken from the scores, [heads, queries, keys]."""
        return self.slopes[:, None, None] * self.distance


@broken("alibi-ignored", "ALiBi is ignored")
class AlibiIgnored(Alibi):
    def bias(self) -> Tensor:
        return torch.zeros(())


@broken("alibi-of-the-kv-head")
class AlibiOfTheKVHead(Alibi):
    def bias(self) -> Tensor:
        return self.slopes[self.head_map()][:, None, None] * self.distance


@broken("alibi-rounded-in-the-dtype")
class AlibiRounded(Alibi):
    """Distances in bfloat16: beyond 256 they are no longer the numbers that they are."""

    def bias(self) -> Tensor:
        return (self.slopes[:, None, None].bfloat16() * self.distance.bfloat16()).float()
