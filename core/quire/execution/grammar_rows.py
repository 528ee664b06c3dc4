"""Rows whose next token a grammar limits: their matchers, and masks filled beside other work.

A mask depends on its row's token before. Where that is on the host, masks are filled in a thread
while the forward pass runs; where it is still in flight, the step is launched but for its end, and
the thread begins when the token was collected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from attrs import define
from numpy.typing import NDArray
from torch import Tensor

from quire.errors import CONTRADICTION
from quire.execution.grammar_masks import GrammarMasks
from quire.interfaces.grammar import CompiledGrammar, GrammarMatcher, GrammarStuck
from quire.request import SamplingParams
from quire.request_checks import NO_TOKEN_LEFT, tokens_left
from quire.scheduling.output import AddedSequence, SchedulerOutput

Compile = Callable[[SamplingParams], CompiledGrammar]
Raised = list[Exception | None]


@define(kw_only=True)
class _Filling:
    """The masks of a step: of which sequences, which of them each row has (from 1; 0: none)."""

    rows: list[int]
    sequence_ids: list[int]
    which: list[int]
    masks: NDArray[np.int32]
    raised: Future[Raised]


class GrammarRows:
    """The matchers of sequences that hold a row; without any, nothing is kept and nothing runs."""

    def __init__(self, masks: GrammarMasks) -> None:
        self.compile: Compile | None = None  # the engine's, set before any request comes
        self.masks = masks
        self._matchers: dict[int, GrammarMatcher] = {}  # by sequence id
        self._added: dict[int, AddedSequence] = {}
        self._rows: dict[int, int] = {}  # row to sequence id
        self._stuck: dict[int, str] = {}  # sequences that cannot go on, until they are collected
        self._filling: _Filling | None = None
        self._thread: ThreadPoolExecutor | None = None

    def remove(self, output: SchedulerOutput, row_of: Mapping[int, int]) -> None:
        """Forget the sequences that give their rows back."""
        if not self._rows:
            return
        for sequence_id in (*output.finished, *output.preempted):
            self._matchers.pop(sequence_id, None)
            self._added.pop(sequence_id, None)
            self._stuck.pop(sequence_id, None)
            self._rows.pop(row_of.get(sequence_id, -1), None)

    def add(self, added: AddedSequence) -> None:
        """Begin a grammar, or go on in it after what was generated before a preemption."""
        if added.params.structured_outputs is None:
            return
        assert self.compile is not None, "set when the engine was made"
        sequence_id = added.sequence_id
        self._rows[added.row] = sequence_id
        self._added[sequence_id] = added
        try:
            self._matchers[sequence_id] = matcher = self.compile(added.params).start()
            for token_id in added.token_ids[added.num_prompt_tokens :]:
                matcher.accept(token_id)
        except Exception as error:  # noqa: BLE001  a plugin's fault ends its own sequence
            self._stop(sequence_id, error)

    def limit(self, sequence_ids: Iterable[int]) -> bool:
        """Whether any of these sequences has begun a grammar in an earlier step."""
        return bool(self._matchers) and any(i in self._matchers for i in sequence_ids)

    def asks(self, rows: list[int]) -> bool:
        """Whether a grammar limits any of these rows."""
        return bool(self._rows) and any(row in self._rows for row in rows)

    # Masks are filled and applied

    def begin(self, rows: list[int]) -> None:
        """Begin to fill the masks of the rows that a step samples, in a thread."""
        if not self.asks(rows):
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "quire-grammar-masks")
        threads, has_begun = self._thread, threading.Event()

        def submit(work: Callable[..., Raised], *arguments: object) -> Future[Raised]:
            return threads.submit(_tell_and_do, has_begun, work, *arguments)

        self._fill(rows, submit)
        # Else this thread, which has Python's lock, would keep that one from its library's work.
        has_begun.wait()

    def _fill(self, rows: list[int], submit: Callable[..., Future[Raised]]) -> _Filling:
        limited = [(row, self._rows[row]) for row in rows if row in self._rows]
        going = [(row, i) for row, i in limited if i in self._matchers and i not in self._stuck]
        masks = self.masks.begin(len(going))
        places = {row: place for place, (row, _) in enumerate(going, start=1)}
        self._filling = _Filling(
            rows=rows,
            sequence_ids=[i for _, i in going],
            which=[places.get(row, 0) for row in rows],
            masks=masks,
            raised=submit(_fill, [self._matchers[i] for _, i in going], masks),
        )
        return self._filling

    def _filled(self, rows: list[int]) -> _Filling:
        """Return the masks of these rows: those that were begun, or else made now."""
        filling, self._filling = self._filling, None
        if filling is None or filling.rows != rows:
            filling, self._filling = self._fill(rows, _at_once), None
        for place, error in enumerate(filling.raised.result()):
            if error is not None:
                self._stop(filling.sequence_ids[place], error)
                filling.masks[place] = -1
        return filling

    def send(self, rows: list[int]) -> None:
        """Enqueue the copy of these rows' masks, for `masks.forbid`."""
        filling = self._filled(rows)
        self.masks.send(filling.which, len(filling.masks))

    def apply(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Return the logits [len(rows), vocab_size], -inf where a row's grammar has no token.

        They are changed in place.
        """
        if not self.asks(rows):
            return logits
        if logits.device.type != "cpu":
            self.send(rows)
            logits = self.masks.forbid(logits)
            self.masks.note_read()
            return logits
        filling = self._filled(rows)
        places = [place for place, which in enumerate(filling.which) if which]
        if len(places) == len(rows):
            return self.masks.forbid_on_host(logits, filling.masks)
        where = torch.tensor(places, dtype=torch.int64)
        own = self.masks.forbid_on_host(logits.index_select(0, where), filling.masks)
        return logits.index_copy_(0, where, own)

    # Tokens come back

    def accept(self, tokens: dict[int, list[int]], errors: dict[int, str]) -> None:
        """Go on by the tokens of a step, by sequence id; what cannot is moved to `errors`."""
        if not self._rows:
            return
        for sequence_id in errors.keys() & self._matchers.keys():
            errors[sequence_id] = self._without_tokens(sequence_id, errors[sequence_id])
        going = [i for i in tokens if i in self._matchers and i not in self._stuck]
        self._go_on(going, tokens)
        for sequence_id in self._stuck.keys() & tokens.keys():
            errors[sequence_id] = self._stuck[sequence_id]
            del tokens[sequence_id]

    def _go_on(self, sequence_ids: list[int], tokens: dict[int, list[int]]) -> None:
        """Let the matchers of these sequences accept their tokens, one of each at a time."""
        turn = 0
        while sequence_ids:
            given = [tokens[i][turn] for i in sequence_ids]
            matchers = [self._matchers[i] for i in sequence_ids]
            try:
                raised = type(matchers[0]).accept_each(matchers, given)
            except Exception as error:  # noqa: BLE001  a plugin's fault ends its own sequences
                raised = [error] * len(matchers)
            for sequence_id, one in zip(sequence_ids, raised, strict=True):
                if one is not None:
                    self._stop(sequence_id, one)
            turn += 1
            sequence_ids = [i for i in sequence_ids if turn < len(tokens[i])]

    def _without_tokens(self, sequence_id: int, error: str) -> str:
        """Return the error of a row that has no finite logit: other parameters may be why."""
        added = self._added[sequence_id]
        mask = self.masks.one()
        try:
            self._matchers[sequence_id].fill_mask(mask)
        except Exception:  # noqa: BLE001  a plugin's fault; what the sampler found stands
            return error
        if not mask.any():
            return "the grammar cannot go on: no token can continue it"
        words = added.bad_words_token_ids
        if words or not tokens_left(mask, added.params, ()):
            return f"{CONTRADICTION}{NO_TOKEN_LEFT}"
        return error

    def _stop(self, sequence_id: int, error: Exception) -> None:
        kind = "" if isinstance(error, GrammarStuck) else f"{type(error).__name__}: "
        self._stuck[sequence_id] = f"the grammar cannot go on: {kind}{error}"


def _fill(matchers: list[GrammarMatcher], masks: NDArray[np.int32]) -> Raised:
    if not matchers:
        return []
    try:
        return type(matchers[0]).fill_masks(matchers, masks)
    except Exception as error:  # noqa: BLE001  a plugin's fault ends its own sequences
        return [error] * len(matchers)


def _tell_and_do(
    has_begun: threading.Event, work: Callable[..., Raised], *arguments: object
) -> Raised:
    has_begun.set()
    return work(*arguments)


def _at_once(work: Callable[..., Raised], *arguments: object) -> Future[Raised]:
    future: Future[Raised] = Future()
    future.set_result(work(*arguments))
    return future
