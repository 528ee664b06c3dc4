"""Which beams of a request go on and which sequences are done: numbers only, no blocks, no rows."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from typing import NamedTuple

from attrs import define, frozen

from quire.request import FinishReason, Request, TokenLogprobs


class Link(NamedTuple):
    """A generated token and those before it, which beams share."""

    before: Link | None
    token_id: int
    logprobs: TokenLogprobs

    def chain(self) -> list[Link]:
        """Return all links, the first token's first."""
        found: list[Link] = []
        link: Link | None = self
        while link is not None:
            found.append(link)
            link = link.before
        return found[::-1]


class Move(NamedTuple):
    """A beam's next token: `slot` goes on from what `parent` has."""

    slot: int
    parent: int
    token_id: int


@frozen
class Hypothesis:
    """A sequence that is done; `score` includes the length penalty."""

    score: float
    link: Link
    reason: FinishReason


@define
class _Beam:
    logprob: float
    link: Link | None


class _Candidate(NamedTuple):
    logprob: float
    parent: int
    token_id: int
    rank: int  # in its parent's list of the most likely tokens, from 0
    of: TokenLogprobs

    def link(self, before: Link | None) -> Link:
        entry = TokenLogprobs(
            logprob=self.of.top_logprobs[self.rank],
            rank=self.rank + 1,
            top_ids=self.of.top_ids,
            top_logprobs=self.of.top_logprobs,
        )
        return Link(before, self.token_id, entry)


def num_candidates(request: Request) -> int:
    """Return how many of its most likely tokens each beam must name.

    As many as there are beams go on even if every stop token is among the best.
    """
    options = request.params.beam_search
    assert options is not None, f"{request.request_id} is no beam search"
    return options.beam_width + len(request.stop_token_ids)


class BeamSearch:
    """The search of one request, over slots 0 to `width` - 1, of which the first begins alone.

    Source: Transformers' `generate` with `num_beams`, whose sequences and scores it finds.
    """

    def __init__(self, request: Request, max_generated: int) -> None:
        options = request.params.beam_search
        assert options is not None, f"{request.request_id} is no beam search"
        self.width = options.beam_width
        self.num_generated = 0
        self.done: list[Hypothesis] = []  # best first
        self._length_penalty = float(options.length_penalty)
        self._early_stopping = options.early_stopping
        self._stop_token_ids = request.stop_token_ids
        self._min_tokens = request.params.min_tokens
        self._max_generated = max_generated
        self._beams = [_Beam(0.0, None)]

    @property
    def num_beams(self) -> int:
        """Slots in use."""
        return len(self._beams)

    def advance(self, results: Items[TokenLogprobs]) -> list[Move]:
        """Take each slot's most likely tokens, choose, and say how each slot goes on.

        No moves: the search is over, and `done` has what it found.
        """
        self.num_generated += 1
        is_last = self.num_generated == self._max_generated
        candidates = self._candidates(results)
        stops = self._stop_token_ids
        for candidate in candidates[: self.width]:
            if is_last or candidate.token_id in stops:
                self._finish(candidate)
        self.done.sort(key=lambda found: -found.score)
        del self.done[self.width :]
        if is_last:
            return []
        going = [c for c in candidates if c.token_id not in stops][: self.width]
        return self._assign(going) if self._can_improve(going[0].logprob) else []

    def _candidates(self, results: Items[TokenLogprobs]) -> list[_Candidate]:
        may_stop = self.num_generated > self._min_tokens
        found = [
            _Candidate(beam.logprob + logprob, slot, token_id, rank, result)
            for slot, (beam, result) in enumerate(zip(self._beams, results, strict=True))
            for rank, (token_id, logprob) in enumerate(
                zip(result.top_ids, result.top_logprobs, strict=True)
            )
            if may_stop or token_id not in self._stop_token_ids
        ]
        found.sort(key=lambda candidate: -candidate.logprob)
        return found

    def _finish(self, candidate: _Candidate) -> None:
        is_stop = candidate.token_id in self._stop_token_ids
        reason = FinishReason.STOP if is_stop else FinishReason.LENGTH
        link = candidate.link(self._beams[candidate.parent].link)
        score = self._score(candidate.logprob, self.num_generated)
        self.done.append(Hypothesis(score, link, reason))

    def _score(self, logprob: float, length: int) -> float:
        return logprob / math.pow(length, self._length_penalty)

    def _can_improve(self, best_running: float) -> bool:
        """Whether a running beam may still come among the best that are done."""
        if len(self.done) < self.width:
            return True
        if self._early_stopping is True:
            return False
        length = self.num_generated
        if self._early_stopping == "never" and self._length_penalty > 0:
            length = self._max_generated
        return self._score(best_running, length) > self.done[-1].score

    def _assign(self, going: list[_Candidate]) -> list[Move]:
        """Give each beam a slot: the parent's own where no better child has it."""
        parents = {candidate.parent for candidate in going}
        free = iter([slot for slot in range(self.width) if slot not in parents])
        moves = []
        beams: dict[int, _Beam] = {}
        for candidate in going:
            slot = candidate.parent
            if slot in beams:
                slot = next(free)
            beams[slot] = _Beam(
                candidate.logprob, candidate.link(self._beams[candidate.parent].link)
            )
            moves.append(Move(slot, candidate.parent, candidate.token_id))
        self._beams = [beams[slot] for slot in range(len(going))]
        return moves
