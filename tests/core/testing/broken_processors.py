"""A right logits processor, and some with one mistake each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.errors import RequestError
from quire.interfaces.sampling import LogitsProcessor, LogitsState
from quire.request import SamplingParams

BROKEN: dict[str, type[LogitsProcessor]] = {}
SAYS: dict[str, str] = {}


class NoRepeat(LogitsProcessor):
    """Forbid tokens that a row has generated already, where it asks for it with a number.

    The argument is how many of the latest tokens count.
    """

    name = "no-repeat"

    def __init__(self, vocab_size: int, max_num_seqs: int, device: str) -> None:
        super().__init__(vocab_size, max_num_seqs, device)
        self.latest: dict[int, int] = {}

    @classmethod
    def check_arguments(cls, arguments: Any, params: SamplingParams) -> None:
        if isinstance(arguments, bool) or not isinstance(arguments, int) or arguments < 1:
            raise RequestError(f"no-repeat is {arguments!r}; allowed: whole numbers from 1.")

    def add_row(self, row: int, arguments: Any, params: SamplingParams) -> None:
        self.latest.pop(row, None)
        if arguments is not None:
            self.latest[row] = arguments

    def remove_row(self, row: int) -> None:
        self.latest.pop(row, None)

    def row_of(self, at: int, state: LogitsState) -> int:
        return int(state.rows[at])

    def first_of(self, row: int, state: LogitsState) -> int:
        return int(state.num_prompt_tokens[row])

    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        for at in range(len(logits)):
            row = self.row_of(at, state)
            if row not in self.latest:
                continue
            last = int(state.num_tokens[row])
            first = max(self.first_of(row, state), last - self.latest[row])
            seen = state.token_history[row, first:last].long()
            logits[at, seen] = float("-inf")
        return logits


def broken(name: str, says: str) -> Any:
    """Enter a processor into the list; `says` is part of what the kit should report."""

    def enter(processor: type[LogitsProcessor]) -> type[LogitsProcessor]:
        BROKEN[name], SAYS[name] = processor, says
        return processor

    return enter


@broken("row-by-place", "asks for nothing|must be -inf")
class RowByPlace(NoRepeat):
    """Takes the place in the batch for the persistent row, in what it was told."""

    def add_row(self, row: int, arguments: Any, params: SamplingParams) -> None:
        super().add_row((row - 5) * 3 % 8, arguments, params)

    def row_of(self, at: int, state: LogitsState) -> int:
        return 3 - int(state.rows[at]) % 4


@broken("prompt-counted", "must be -inf|got -inf|finite logit")
class PromptCounted(NoRepeat):
    def first_of(self, row: int, state: LogitsState) -> int:
        return 0


@broken("never-forgets", "after remove_row")
class NeverForgets(NoRepeat):
    def add_row(self, row: int, arguments: Any, params: SamplingParams) -> None:
        if arguments is not None:
            self.latest[row] = arguments

    def remove_row(self, row: int) -> None:
        return None


@broken("one-too-few", "must be -inf")
class OneTooFew(NoRepeat):
    """Forgets the token in flight."""

    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        state.num_tokens = state.num_tokens - 1
        out = super().apply(logits, state)
        state.num_tokens = state.num_tokens + 1
        return out


@broken("history-cleared", "state.token_history was changed")
class HistoryCleared(NoRepeat):
    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        out = super().apply(logits, state)
        state.token_history.zero_()
        return out


@broken("wide-logits", "apply returns torch.float32")
class WideLogits(NoRepeat):
    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        return super().apply(logits.float(), state)


@broken("centred-by-the-batch", "and its logits were changed")
class CentredByTheBatch(NoRepeat):
    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        out = super().apply(logits, state)
        return out - out.amax() if len(out) > 1 else out


@broken("takes-everything", "they must be refused")
class TakesEverything(NoRepeat):
    @classmethod
    def check_arguments(cls, arguments: Any, params: SamplingParams) -> None:
        return None


@broken("state-of-the-first-step", "a step later")
class StateOfTheFirstStep(NoRepeat):
    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        self.first = getattr(self, "first", state)
        is_like_it = self.first.host_rows == state.host_rows
        return super().apply(logits, self.first if is_like_it else state)


def expected(logits: Tensor, tokens: list[int], num_prompt: int, arguments: Any) -> Tensor:
    """Return what NoRepeat makes of a row."""
    seen = tokens[max(num_prompt, len(tokens) - arguments) :]
    return logits.index_fill(0, torch.tensor(seen, dtype=torch.long), float("-inf"))
