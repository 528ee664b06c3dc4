"""Samplers with one mistake each, and what the kit should say of it."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from plain_sampler import PlainSampler
from torch import Tensor

from quire.interfaces.sampling import SampledTokens, SamplingBatch
from quire.testing.sampler_cases import Row
from quire.testing.sampler_formula import GROUP_SIZE

BROKEN: dict[str, type[PlainSampler]] = {}
SAYS: dict[str, str] = {}


def broken(name: str, says: str) -> Any:
    """Enter a sampler into the list; `says` is part of what the kit should report."""

    def enter(sampler: type[PlainSampler]) -> type[PlainSampler]:
        BROKEN[name] = sampler
        SAYS[name] = says
        return sampler

    return enter


@broken("greedy-takes-the-last-of-equals", "the lowest id counts among equals")
class LastOfEquals(PlainSampler):
    def greedy(self, logits: Tensor) -> int:
        return len(logits) - 1 - int(logits.flip(0).argmax())


@broken("child-ignored", "the child index is ignored")
class ChildIgnored(PlainSampler):
    def counter(self, seed: int, child: int, position: int, i: int) -> Row:
        return Row(seed=seed, position=position)


@broken("position-off-by-one", "the position is off by one")
class PositionOffByOne(PlainSampler):
    def counter(self, seed: int, child: int, position: int, i: int) -> Row:
        return Row(seed=seed, child=child, position=position + 1)


@broken("seed-cut", "the seed is cut to 32 bits")
class SeedCut(PlainSampler):
    def counter(self, seed: int, child: int, position: int, i: int) -> Row:
        return Row(seed=seed & 0xFFFFFFFF, child=child, position=position)


@broken("row-in-the-counter", "instead of token")
class RowInTheCounter(PlainSampler):
    """The place in the batch is part of the counter."""

    def counter(self, seed: int, child: int, position: int, i: int) -> Row:
        return Row(seed=seed + i, child=child, position=position)


@broken("unseeded", "instead of token")
class Unseeded(PlainSampler):
    def noise(self, batch: SamplingBatch, count: int, *, stage: int = 0) -> Tensor:
        return -torch.log(torch.empty(len(batch.seed), count).exponential_())


@broken("uniform-noise", "instead of token")
class UniformNoise(PlainSampler):
    """Right tokens, wrong distribution."""

    def noise(self, batch: SamplingBatch, count: int, *, stage: int = 0) -> Tensor:
        return super().noise(batch, count, stage=stage).neg().exp().neg().exp()


@broken("no-groups", "tokens are drawn without groups")
class NoGroups(PlainSampler):
    def taken(self, scaled: Tensor, i: int) -> int:
        return int((scaled + self.noises[i]).argmax())


@broken("one-noise-for-both-stages", "groups have the noise of tokens")
class OneNoise(PlainSampler):
    def noise(self, batch: SamplingBatch, count: int, *, stage: int = 0) -> Tensor:
        return super().noise(batch, count)


@broken("largest-token-for-the-mass", "instead of token")
class LargestForTheMass(PlainSampler):
    """Takes a group by its most likely token."""

    def taken(self, scaled: Tensor, i: int) -> int:
        best = torch.stack([group.amax() for group in scaled.split(GROUP_SIZE)])
        first = GROUP_SIZE * int((best + self.group_noises[i]).argmax())
        group = slice(first, first + GROUP_SIZE)
        return first + int((scaled[group] + self.noises[i][group]).argmax())


@broken("top-k-one-too-many", "top_k keeps one token too many")
class TopKOneTooMany(PlainSampler):
    def keep_top_k(self, scaled: Tensor, top_k: int) -> Tensor:
        return super().keep_top_k(scaled, top_k + 1)


@broken("top-k-keeps-all-equals", "which the filters drop")
class TopKKeepsAllEquals(PlainSampler):
    def keep_top_k(self, scaled: Tensor, top_k: int) -> Tensor:
        least = scaled.topk(top_k).values[-1]
        return scaled.masked_fill(scaled < least, float("-inf"))


@broken("top-p-stops-short", "top_p drops the token that reaches it")
class TopPStopsShort(PlainSampler):
    def mass_before(self, probabilities: Tensor) -> Tensor:
        return probabilities.cumsum(0)


@broken("top-p-before-top-k", "top_p is applied before top_k")
class TopPBeforeTopK(PlainSampler):
    def filtered(self, logits: Tensor, batch: SamplingBatch, i: int) -> Tensor:
        scaled = logits / batch.temperature[i]
        scaled = self.keep_top_p(scaled, batch.top_p[i])
        return self.keep_min_p(self.keep_top_k(scaled, int(batch.top_k[i])), batch.min_p[i])


@broken("filters-before-the-temperature", "the filters are applied before the temperature")
class FiltersFirst(PlainSampler):
    def filtered(self, logits: Tensor, batch: SamplingBatch, i: int) -> Tensor:
        plain = attrs.evolve(batch, temperature=torch.ones_like(batch.temperature))
        return super().filtered(logits, plain, i) / batch.temperature[i]


@broken("min-p-of-one", "min_p is taken of 1 instead of the most likely token")
class MinPOfOne(PlainSampler):
    def keep_min_p(self, scaled: Tensor, min_p: Tensor) -> Tensor:
        dropped = scaled.log_softmax(0) < min_p.log()
        return scaled.masked_fill(dropped & (scaled < scaled.max()), float("-inf"))


@broken("nan-overlooked", "one NaN: status 0 instead of 1 (NOT_FINITE)")
class NanOverlooked(PlainSampler):
    def status_of(self, logits: Tensor) -> Tensor:
        return super().status_of(logits.masked_fill(logits.isnan(), 0.0))


@broken("one-bad-row-for-all", "finite logits: status 1 instead of 0")
class OneBadRowForAll(PlainSampler):
    def status_of(self, logits: Tensor) -> Tensor:
        status = super().status_of(logits)
        return status.amax(0, keepdim=True).expand_as(status) if len(status) else status


@broken("minus-infinity-is-bad", "finite logits: status 1 instead of 0")
class MinusInfinityIsBad(PlainSampler):
    def status_of(self, logits: Tensor) -> Tensor:
        return (~logits.isfinite().all(1)).int()


@broken("int32-tokens", "token_ids is torch.int32")
class Int32Tokens(PlainSampler):
    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        done = super().sample(logits, batch)
        return attrs.evolve(done, token_ids=done.token_ids.int())


@broken("writes-beside-its-logits", "memory beside the logits was changed")
class WritesBeside(PlainSampler):
    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        done = super().sample(logits, batch)
        if logits.stride(1) == 1 and logits.stride(0) > logits.shape[1]:
            logits.as_strided((len(logits), logits.shape[1] + 1), logits.stride()).fill_(0)
        return done


@broken("flags-believed", "instead of token")
class FlagsBelieved(PlainSampler):
    """Takes `any_top_k` for a promise that every row asks for it."""

    def filtered(self, logits: Tensor, batch: SamplingBatch, i: int) -> Tensor:
        if not batch.any_top_k:
            return super().filtered(logits, batch, i)
        forty = batch.top_k.clamp(max=4)
        return super().filtered(logits, attrs.evolve(batch, top_k=forty), i)


@broken("logprobs-of-the-unfiltered", "logprob ")
class LogprobsOfTheUnfiltered(PlainSampler):
    gives_logprobs = True

    def drawn(self, logits: Tensor, batch: SamplingBatch, i: int) -> tuple[int, float]:
        token, _ = super().drawn(logits, batch, i)
        return token, float(logits.float().log_softmax(0)[token])


@broken("suppressed-tokens-drawn", "instead of token")
class SuppressedTokensDrawn(PlainSampler):
    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        return super().sample(logits, attrs.evolve(batch, suppressed=None))


@broken("temperature-of-the-first-row", "instead of token")
class TemperatureOfTheFirstRow(PlainSampler):
    def filtered(self, logits: Tensor, batch: SamplingBatch, i: int) -> Tensor:
        drawn = batch.temperature[batch.temperature > 0]
        first = attrs.evolve(batch, temperature=drawn[:1].expand_as(batch.temperature))
        return super().filtered(logits, first, i)


@broken("scores-in-bfloat16", "instead of token")
class ScoresInBfloat16(PlainSampler):
    """Scores of 8 bits: near ones become equal."""

    def taken(self, scaled: Tensor, i: int) -> int:
        return super().taken(scaled.bfloat16().float(), i)


@broken("position-cut", "the position is cut to 16 bits")
class PositionCut(PlainSampler):
    def counter(self, seed: int, child: int, position: int, i: int) -> Row:
        return Row(seed=seed, child=child, position=position & 0xFFFF)


@broken("noise-of-the-first-step", "kept from an earlier step")
class NoiseOfTheFirstStep(PlainSampler):
    def noise(self, batch: SamplingBatch, count: int, *, stage: int = 0) -> Tensor:
        made = super().noise(batch, count, stage=stage)
        self.kept: dict[Any, Tensor] = getattr(self, "kept", {})
        return self.kept.setdefault((made.shape, stage), made)


@broken("first-tile-of-tokens", "instead of token")
class FirstTileOfTokens(PlainSampler):
    """What is beyond 64 ids is never the best."""

    def greedy(self, logits: Tensor) -> int:
        return int(logits[:64].argmax())


@broken("greedy-row-with-nan-is-right", "status 0 instead of 1 (NOT_FINITE)")
class GreedyRowWithNaN(PlainSampler):
    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        done = super().sample(logits, batch)
        status = torch.where(batch.temperature == 0, 0, done.status)
        return attrs.evolve(done, status=status.int())


@broken("ids-of-16-bits", "instead of token")
class IdsOf16Bits(PlainSampler):
    def taken(self, scaled: Tensor, i: int) -> int:
        return super().taken(scaled, i) % 2**16


@broken("top-k-of-a-tile", "instead of token")
class TopKOfATile(PlainSampler):
    """A filter keeps no more than 1,024 tokens."""

    def keep_top_k(self, scaled: Tensor, top_k: int) -> Tensor:
        return super().keep_top_k(scaled, min(top_k, 1024) if top_k < len(scaled) else top_k)


@broken("top-p-near-one-ignored", "instead of token")
class TopPNearOneIgnored(PlainSampler):
    def keep_top_p(self, scaled: Tensor, top_p: Tensor) -> Tensor:
        return scaled if top_p >= 0.95 else super().keep_top_p(scaled, top_p)
