"""A draw as `quire.interfaces.sampling.Sampler` defines it, in float64, right or with one mistake.

Nothing here knows of a sampler. What float32 cannot decide - a token at the edge of a filter, two
scores that are nearly equal - is left open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from attrs import Factory, define, evolve, frozen
from torch import Tensor

from quire.testing.sampler_cases import Row, top_k_of

MASK = 0xFFFFFFFF
EPS = torch.finfo(torch.float32).eps
# Tokens of a group, of which a draw takes one before a token.
GROUP_SIZE = 64


@frozen(kw_only=True)
class Mistake:
    """One thing that samplers get wrong; the defaults are right."""

    words: str = ""
    changes: Mapping[str, Any] = Factory(dict)
    position_shift: int = 0
    position_bits: int = 32
    seed_bits: int = 64
    k_shift: int = 0
    filters_first: bool = False
    p_before_k: bool = False
    stops_short: bool = False
    lanes_in_a_row: bool = False
    min_p_of_one: bool = False
    group_size: int = GROUP_SIZE
    stages: tuple[int, int] = (1, 0)


RIGHT = Mistake()
MISTAKES = [
    Mistake(words="the child index is ignored", changes={"child": 0}),
    Mistake(words="the position is ignored", changes={"position": 0}),
    Mistake(words="the seed is ignored", changes={"seed": 0}),
    Mistake(words="the position is off by one", position_shift=1),
    Mistake(words="the position is off by one", position_shift=-1),
    Mistake(words="the seed is cut to 32 bits", seed_bits=32),
    Mistake(words="the position is cut to 16 bits", position_bits=16),
    Mistake(words="top_p is applied before top_k", p_before_k=True),
    Mistake(words="top_k is ignored", changes={"top_k": None}),
    Mistake(words="top_p is ignored", changes={"top_p": 1.0}),
    Mistake(words="min_p is ignored", changes={"min_p": 0.0}),
    Mistake(words="the temperature is ignored", changes={"temperature": 1.0}),
    Mistake(words="top_k keeps one token too many", k_shift=1),
    Mistake(words="top_k keeps one token too few", k_shift=-1),
    Mistake(words="top_p drops the token that reaches it", stops_short=True),
    Mistake(words="the filters are applied before the temperature", filters_first=True),
    Mistake(words="min_p is taken of 1 instead of the most likely token", min_p_of_one=True),
    Mistake(words="tokens are drawn without groups", group_size=2**30),
    Mistake(words="groups have the noise of tokens", stages=(0, 0)),
    Mistake(words="the two stages' noise is exchanged", stages=(0, 1)),
    Mistake(words="a counter's four lanes are not four tokens in a row", lanes_in_a_row=True),
]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> list[Tensor]:
    """Return the four lanes of Philox4x32-10, int64 tensors in [0, 2**32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        # A wrapped product keeps its 64 bits; shifted to the right it must lose its sign.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32) & MASK ^ c1 ^ k0,
            p1 & MASK,
            (p0 >> 32) & MASK ^ c3 ^ k1,
            p0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def uniforms(
    row: Row, size: int, mistake: Mistake = RIGHT, *, num_draws: int = 1, stage: int = 0
) -> Tensor:
    """Return the float32 numbers in (0, 1) of every token or group, [num_draws, size].

    Draws are at the row's position and those after it.
    """
    quads = torch.arange((size + 3) // 4).expand(num_draws, -1)
    position = row.position + mistake.position_shift + torch.arange(num_draws)[:, None]
    if mistake.changes.get("position") is not None:
        position = position * 0
    child, last = torch.full_like(quads, row.child), torch.full_like(quads, stage)
    seed = row.seed & ((1 << mistake.seed_bits) - 1)
    position = position & ((1 << mistake.position_bits) - 1)
    lanes = philox((quads, position, child, last), seed)
    joined = torch.cat(lanes, 1) if mistake.lanes_in_a_row else torch.stack(lanes, -1).flatten(1)
    return ((joined[:, :size].float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


@define(kw_only=True)
class Allowed:
    """Which tokens the filters leave, [vocab_size]: surely, and perhaps; `scaled` logits."""

    surely: Tensor
    perhaps: Tensor
    scaled: Tensor

    @property
    def is_clear(self) -> bool:
        """Whether no token is at the edge of a filter."""
        return torch.equal(self.surely, self.perhaps)


def allowed(logits: Tensor, row: Row, mistake: Mistake = RIGHT) -> Allowed:
    """Return what temperature, top_k, top_p and min_p leave of `logits` [vocab_size]."""
    row = evolve(row, **mistake.changes)
    temperature = torch.tensor(row.temperature, dtype=torch.float32).double()
    scaled = logits.double() / temperature
    seen = logits.double() if mistake.filters_first else scaled
    near = 4 * EPS * seen[seen.isfinite()].abs().max()
    values, order = seen.sort(descending=True, stable=True)
    top = float(values[0])
    k = min(max(1, top_k_of(row, len(logits)) + mistake.k_shift), len(logits))
    keeps = torch.arange(len(logits)) < k
    open_ = _edge_of_k(values, k, near)
    if row.top_p < 1:
        base = torch.ones_like(keeps) if mistake.p_before_k else keeps
        inside, edge = _inside_p(values, base, row, mistake)
        keeps, open_ = keeps & inside, (open_ | edge) & (inside | edge)
    if row.min_p > 0:
        floor = (0.0 if mistake.min_p_of_one else top) + math.log(_single(row.min_p))
        if mistake.min_p_of_one:
            floor += float(values.masked_fill(~keeps, -math.inf).logsumexp(0))
        edge = (values - floor).abs() <= near + 2 * EPS * abs(floor)
        # The most likely token and its equals stay, whatever is rounded.
        edge &= values != values[0]
        keeps, open_ = keeps & (values >= floor), (open_ & (values >= floor)) | (edge & keeps)
    keeps[0] = True
    keeps, open_ = keeps & (values > -math.inf), open_ & (values > -math.inf)
    surely, perhaps = torch.zeros_like(keeps), torch.zeros_like(keeps)
    surely[order], perhaps[order] = keeps & ~open_, keeps | open_
    return Allowed(surely=surely, perhaps=perhaps, scaled=scaled)


def _single(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _edge_of_k(values: Tensor, k: int, near: Tensor) -> Tensor:
    """Return which of the ordered values are too near the k-th to be told from it."""
    edge = (values - values[k - 1]).abs() <= near
    # Equals are ordered by token id, in any arithmetic.
    is_tie = bool((values[edge] == values[k - 1]).all())
    return torch.zeros_like(edge) if is_tie or k == len(values) else edge


def _inside_p(values: Tensor, kept: Tensor, row: Row, mistake: Mistake) -> tuple[Tensor, Tensor]:
    """Return which ordered tokens top_p leaves, and which float32 may take or leave."""
    masked = values.masked_fill(~kept, -math.inf)
    wide, narrow = masked.softmax(0), masked.float().softmax(0)
    before, plain = wide.cumsum(0) - wide, narrow.cumsum(0) - narrow
    near = 2 * (plain.double() - before).abs().max() + EPS
    limit = _single(row.top_p)
    reached = before + wide if mistake.stops_short else before
    inside, edge = reached < limit, (reached - limit).abs() <= near
    inside[0], edge[0] = True, False
    return inside, edge


@define(kw_only=True)
class Draws:
    """What a row may give: the scores of tokens and of groups, and how near two may be confused.

    `scores` [num_draws, vocab_size]. Groups of `group_size` have scores [num_draws, num_groups] of
    what surely is left, `low`, and of what perhaps is, `high`.
    """

    allowed: Allowed
    scores: Tensor
    near: float
    low: Tensor
    high: Tensor
    near_groups: float
    group_size: int

    @property
    def best(self) -> Tensor:
        """The tokens that are drawn, [num_draws]."""
        return self._among(self.low.argmax(1)).argmax(1)

    def _among(self, groups: Tensor) -> Tensor:
        """Return the scores of one group a draw, what surely is left of it; -inf for all else."""
        own = torch.arange(self.scores.shape[1]) // self.group_size == groups[:, None]
        return self.scores.masked_fill(~(own & self.allowed.surely), -math.inf)

    def may_be(self, tokens: Tensor) -> Tensor:
        """Answer which of the tokens [num_draws] may be drawn, as far as float32 can tell."""
        groups = tokens // self.group_size
        wins = self.high.gather(1, groups[:, None])[:, 0] >= self.low.amax(1) - self.near_groups
        best = self._among(groups).amax(1)
        is_best = self.scores.gather(1, tokens[:, None])[:, 0] >= best - self.near
        return self.allowed.perhaps[tokens] & wins & is_best


def draw(logits: Tensor, row: Row, mistake: Mistake = RIGHT, *, num_draws: int = 1) -> Draws:
    """Return the draws of one row: of a group by its mass and noise, then of one of its tokens."""
    found = allowed(logits, row, mistake)
    changed = evolve(row, **mistake.changes)
    temperature = torch.tensor(changed.temperature, dtype=torch.float32)
    plain = logits.float() / temperature

    def noisy(exact: Tensor, single: Tensor, stage: int) -> tuple[Tensor, float]:
        uniform = uniforms(changed, exact.shape[-1], mistake, num_draws=num_draws, stage=stage)
        scores = exact - torch.log(-torch.log1p(-uniform.double()))
        rounded = single - torch.log(-torch.log1p(-uniform))
        usable = scores.isfinite()
        error = (rounded.double() - scores)[usable].abs().max().item()
        # Each of the two scores may err by twice as much as plain PyTorch, plus one rounding.
        return scores, 2 * (2 * error + EPS * scores[usable].abs().max().item())

    size = min(mistake.group_size, len(logits))
    scores, near = noisy(found.scaled, plain, mistake.stages[1])
    least, most = (_masses(found.scaled, kept, size) for kept in (found.surely, found.perhaps))
    low, near_groups = noisy(least, _masses(plain, found.surely, size), mistake.stages[0])
    high = noisy(most, most.float(), mistake.stages[0])[0]
    return Draws(
        allowed=found, scores=scores, near=near,
        low=low, high=high, near_groups=near_groups, group_size=size,
    )  # fmt: skip


def _masses(scaled: Tensor, kept: Tensor, size: int) -> Tensor:
    """Return the logarithms of the groups' masses, [num_groups]."""
    left = scaled.masked_fill(~kept, -math.inf)
    padded = torch.nn.functional.pad(left, (0, -len(left) % size), value=-math.inf)
    return padded.unflatten(0, (-1, size)).logsumexp(1)
