"""Rows whose next token a grammar limits: their masks, applied to the logits on the device.

The masks are filled on the host after the forward pass was launched. They depend on a row's token
before, so where that is still in flight the step is launched but for its end, and ends when the
token was collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from quire.execution.adjustments import to_device
from quire.interfaces.grammar import CompiledGrammar, GrammarMatcher, GrammarStuck
from quire.request import SamplingParams
from quire.scheduling.output import AddedSequence, SchedulerOutput

Compile = Callable[[SamplingParams], CompiledGrammar]
BITS = 32


class GrammarRows:
    """The matchers of sequences that hold a row; without any, nothing is kept and nothing runs."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.compile: Compile | None = None  # the engine's, set before any request comes
        self._vocab_size = vocab_size
        self._device = str(device)
        self._matchers: dict[int, GrammarMatcher] = {}  # by sequence id
        self._rows: dict[int, int] = {}  # row to sequence id
        self._stuck: dict[int, str] = {}  # sequences that cannot go on, until they are collected
        self._shifts = torch.arange(BITS, dtype=torch.int32, device=device)

    def remove(self, output: SchedulerOutput, row_of: Mapping[int, int]) -> None:
        """Forget the sequences that give their rows back."""
        if not self._matchers and not self._stuck:
            return
        for sequence_id in (*output.finished, *output.preempted):
            self._matchers.pop(sequence_id, None)
            self._stuck.pop(sequence_id, None)
            self._rows.pop(row_of.get(sequence_id, -1), None)

    def add(self, added: AddedSequence) -> None:
        """Begin a grammar, or go on in it after what was generated before a preemption."""
        if added.params.structured_outputs is None:
            return
        assert self.compile is not None, "set when the engine was made"
        sequence_id = added.sequence_id
        self._rows[added.row] = sequence_id
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

    def apply(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Return the logits [len(rows), vocab_size], -inf where a row's grammar has no token.

        They are changed in place.
        """
        if not self.asks(rows):
            return logits
        places = [place for place, row in enumerate(rows) if row in self._rows]
        forbidden = self._forbidden(self._masks([self._rows[rows[place]] for place in places]))
        if len(places) == len(rows):
            return logits.masked_fill_(forbidden, float("-inf"))
        where = to_device(places, torch.int64, self._device)
        own = logits.index_select(0, where).masked_fill_(forbidden, float("-inf"))
        return logits.index_copy_(0, where, own)

    def _forbidden(self, masks: np.ndarray) -> Tensor:
        """Return which tokens have no bit, bool [rows, vocab_size], on the device."""
        if self._device == "cpu":
            # 15 us for 64 rows of 4,096 tokens, and 123 us by shifts, on one thread.
            flags = np.unpackbits(~masks.view(np.uint8), axis=1, bitorder="little")
            return torch.from_numpy(flags).view(torch.bool)[:, : self._vocab_size]
        bits = to_device(masks, torch.int32, self._device)
        forbidden = ((bits.unsqueeze(-1) >> self._shifts) & 1).view(len(masks), -1) == 0
        return forbidden[:, : self._vocab_size]

    def _masks(self, sequence_ids: list[int]) -> np.ndarray:
        """Return a bit a token for each sequence; all are set where it cannot go on."""
        words = (self._vocab_size + BITS - 1) // BITS
        masks = np.full((len(sequence_ids), words), -1, np.int32)
        going = {
            i: self._matchers[sequence_id]
            for i, sequence_id in enumerate(sequence_ids)
            if sequence_id in self._matchers and sequence_id not in self._stuck
        }
        for i, error in self._fill(masks, going).items():
            masks[i] = -1
            self._stop(sequence_ids[i], error)
        for place in np.flatnonzero(~masks.any(axis=1)):
            masks[place] = -1
            self._stop(sequence_ids[place], GrammarStuck("no token can continue it"))
        return masks

    @staticmethod
    def _fill(masks: np.ndarray, going: dict[int, GrammarMatcher]) -> dict[int, Exception]:
        """Fill the rows of `masks` that have a matcher; return what those raised that cannot."""
        if not going:
            return {}
        places, matchers = list(going), list(going.values())
        own = masks if len(places) == len(masks) else masks[places]
        try:
            raised = type(matchers[0]).fill_masks(matchers, own)
        except Exception as error:  # noqa: BLE001  a plugin's fault ends its own sequences
            raised = [error] * len(places)
        if own is not masks:
            masks[places] = own
        return {i: e for i, e in zip(places, raised, strict=True) if e is not None}

    def accept(self, tokens: dict[int, list[int]], errors: dict[int, str]) -> None:
        """Go on by the tokens of a step, by sequence id; what cannot is moved to `errors`."""
        if not self._matchers and not self._stuck:
            return
        for sequence_id in errors.keys() & self._matchers.keys():
            errors[sequence_id] += ", or other parameters forbid every token that its form allows"
        for sequence_id in [i for i in tokens if i in self._matchers or i in self._stuck]:
            self._go_on(sequence_id, tokens[sequence_id])
            if sequence_id in self._stuck:
                errors[sequence_id] = self._stuck[sequence_id]
                del tokens[sequence_id]

    def _go_on(self, sequence_id: int, token_ids: list[int]) -> None:
        if sequence_id in self._stuck:
            return
        try:
            for token_id in token_ids:
                self._matchers[sequence_id].accept(token_id)
        except Exception as error:  # noqa: BLE001  a plugin's fault ends its own sequence
            self._stop(sequence_id, error)

    def _stop(self, sequence_id: int, error: Exception) -> None:
        kind = "" if isinstance(error, GrammarStuck) else f"{type(error).__name__}: "
        self._stuck[sequence_id] = f"the grammar cannot go on: {kind}{error}"
