"""Backends with one mistake each, and what the kit should guess where it can know."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from gather_attention import GatherAttention, Plan
from torch import Tensor

from quire.interfaces.attention import AttentionLayer, AttentionSpec

BROKEN: dict[str, type[GatherAttention]] = {}
GUESSES: dict[str, str] = {}


def broken(name: str, guess: str | None = None) -> Any:
    """Enter a backend into the list; `guess` is part of what the kit should say."""

    def enter(backend: type[GatherAttention]) -> type[GatherAttention]:
        BROKEN[name] = backend
        if guess is not None:
            GUESSES[name] = guess
        return backend

    return enter


@broken("scale-missing", "the scale is missing")
class ScaleMissing(GatherAttention):
    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        return self.capped(q.float().transpose(0, 1) @ keys.mT)


@broken("scale-squared", "the scale is applied twice")
class ScaleSquared(GatherAttention):
    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        return self.capped(q.float().transpose(0, 1) @ keys.mT * self.spec.scale**2)


@broken("scale-of-the-head-size")
class ScaleOfTheHeadSize(GatherAttention):
    """Right for most models, but the spec says what the scale is."""

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        return self.capped(q.float().transpose(0, 1) @ keys.mT * self.spec.head_dim**-0.5)


@broken("softcap-ignored", "the soft cap is ignored")
class SoftcapIgnored(GatherAttention):
    def capped(self, scores: Tensor) -> Tensor:
        return scores


@broken("softcap-before-scale", "the soft cap is taken before the scale")
class SoftcapBeforeScale(GatherAttention):
    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        return self.capped(q.float().transpose(0, 1) @ keys.mT) * self.spec.scale


@broken("sinks-ignored", "the sinks are ignored")
class SinksIgnored(GatherAttention):
    def sinks_of(self, layer: AttentionLayer) -> Tensor | None:
        return None


@broken("sinks-of-the-first-head")
class SinksOfTheFirstHead(GatherAttention):
    def sinks_of(self, layer: AttentionLayer) -> Tensor | None:
        return None if layer.sinks is None else layer.sinks[:1].expand(self.spec.num_heads)


@broken("sinks-of-the-first-layer")
class SinksOfTheFirstLayer(GatherAttention):
    def sinks_of(self, layer: AttentionLayer) -> Tensor | None:
        self.first = getattr(self, "first", layer.sinks)
        return self.first


@broken("heads-by-modulo", "by modulo")
class HeadsByModulo(GatherAttention):
    def head_map(self) -> Tensor:
        return torch.arange(self.spec.num_heads) % self.spec.num_kv_heads


@broken("second-group-ignored", "all heads read the first KV head")
class SecondGroupIgnored(GatherAttention):
    def head_map(self) -> Tensor:
        return torch.zeros(self.spec.num_heads, dtype=torch.long)


@broken("last-head-of-a-wide-group")
class LastHeadOfAWideGroup(GatherAttention):
    """A tile of four heads: what a group has more reads the next KV head."""

    def head_map(self) -> Tensor:
        group = min(4, self.spec.num_heads // self.spec.num_kv_heads)
        return (torch.arange(self.spec.num_heads) // group).clamp(max=self.spec.num_kv_heads - 1)


class Shifted(GatherAttention):
    """Masks that are off by a little."""

    causal: ClassVar[int] = 0
    window: ClassVar[int] = 0

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        distance = positions[:, None] - keys
        found = (distance >= self.causal) & (keys < length)
        if self.spec.sliding_window is not None:
            found &= distance < self.spec.sliding_window + self.window
        return found


@broken("window-one-too-long", "window is one token too long")
class WindowOneTooLong(Shifted):
    window = 1


@broken("window-one-too-short", "window is one token too short")
class WindowOneTooShort(Shifted):
    window = -1


@broken("window-ignored", "the window is ignored")
class WindowIgnored(Shifted):
    window = 10**6


@broken("causal-one-ahead", "the next token is seen")
class CausalOneAhead(Shifted):
    causal = -1


@broken("causal-one-behind", "a token does not see itself")
class CausalOneBehind(Shifted):
    causal = 1


@broken("not-causal", "there is no causal mask")
class NotCausal(Shifted):
    causal = -(10**6)


@broken("window-from-the-end")
class WindowFromTheEnd(GatherAttention):
    """The window of the last query serves all of them."""

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        found = (positions[:, None] >= keys) & (keys < length)
        if self.spec.sliding_window is not None:
            found &= keys >= length - self.spec.sliding_window
        return found


@broken("length-for-position", "there is no causal mask")
class LengthForPosition(GatherAttention):
    """The sequence's length where the query's own position is meant."""

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        distance = length - 1 - keys
        found = (distance >= 0).expand(len(positions), -1).clone()
        if self.spec.sliding_window is not None:
            found &= distance < self.spec.sliding_window
        return found


@broken("causal-from-the-top-left")
class CausalFromTheTopLeft(GatherAttention):
    """The first query sees the first key: right without a past."""

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        return super().visible(torch.arange(len(positions)), keys, length)


@broken("tail-unmasked", "the tail of the last block is not masked")
class TailUnmasked(GatherAttention):
    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        size = self.spec.block_size
        tail = (keys >= length) & (keys < -(-length // size) * size)
        found = super().visible(positions, keys, length) | tail
        if self.spec.sliding_window is not None:
            found &= positions[:, None] - keys < self.spec.sliding_window
        return found


@broken("hidden-keys-weighted-with-zero")
class HiddenKeysWeightedWithZero(GatherAttention):
    """0 * NaN is NaN."""

    def gathered(self, cache: Tensor, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        return super().gathered(cache, slots, torch.ones_like(visible))


@broken("last-of-a-block-dropped")
class LastOfABlockDropped(GatherAttention):
    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        size, found = self.spec.block_size, super().visible(positions, keys, length)
        return found & ((keys % size != size - 1) | (keys == positions[:, None]))


@broken("first-block-only-once-long")
class LongContextsCut(GatherAttention):
    """Keys from 32 on are forgotten."""

    def visible(self, positions: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        found = super().visible(positions, keys, length)
        return found & ((keys < 32) | (keys == positions[:, None]))


@broken("blocks-in-a-row", "blocks are read in a row")
class BlocksInARow(GatherAttention):
    def slots_of(self, plan: Plan, row: int) -> Tensor:
        positions = torch.arange(plan.block_table.shape[1] * self.spec.block_size)
        return (plan.block_table[row, 0].long() * self.spec.block_size + positions) % self.num_slots

    def gathered(self, cache: Tensor, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        return super().gathered(cache, slots, visible)

    def attend(self, layer: AttentionLayer, *tensors: Any) -> None:
        self.num_slots = tensors[3].flatten(0, 1).shape[0]
        super().attend(layer, *tensors)


@broken("next-row-of-the-table", "another sequence's row")
class NextRowOfTheTable(GatherAttention):
    def slots_of(self, plan: Plan, row: int) -> Tensor:
        return super().slots_of(plan, (row + 1) % len(plan.block_table))


@broken("keys-and-values-swapped", "values and keys are swapped")
class KeysAndValuesSwapped(GatherAttention):
    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        if spec.head_dim != spec.value_head_dim:
            return "values are as wide as keys"
        return super().why_unsupported(spec)

    def gathered(self, cache: Tensor, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().gathered(cache, slots, visible)
        return values, keys
