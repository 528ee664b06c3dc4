"""Log-probabilities of chosen tokens and of the most likely ones, on the device.

They are those of the model's own logits, in float32, before bias, penalties and temperature.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import define
from torch import Tensor

from quire.execution.batch_builder import PromptRows
from quire.execution.staging import to_device
from quire.request import TokenLogprobs
from quire.scheduling.output import AddedSequence

LOWEST = -9999.0


@define(kw_only=True)
class Scores:
    """Of each row the chosen token's log-probability, then the best: float32 [rows, 1 + k].

    `ids` int64 [rows, 1 + k]: the chosen token's rank, then the best tokens' ids. `num_top` says
    how many of the best each row asks for; k is the largest.
    """

    values: Tensor
    ids: Tensor
    num_top: list[int]

    def entries(self) -> list[TokenLogprobs]:
        """Return one entry a row; the tensors must be on the host."""
        rows = zip(self.values.tolist(), self.ids.tolist(), self.num_top, strict=True)
        return [
            TokenLogprobs(
                logprob=values[0],
                rank=ids[0],
                top_ids=tuple(ids[1 : 1 + k]),
                top_logprobs=tuple(values[1 : 1 + k]),
            )
            for values, ids, k in rows
        ]


def score(logprobs: Tensor, token_ids: Tensor, num_top: list[int]) -> Scores:
    """Look up a token a row in log-probabilities [rows, vocab_size]; gives no NaN or infinity."""
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    rank = (logprobs > chosen).sum(dim=1, keepdim=True) + 1
    best = logprobs.topk(min(max(num_top), logprobs.shape[1]), dim=1)
    values = torch.cat([chosen, best.values], dim=1)
    values = values.nan_to_num_(nan=LOWEST, neginf=LOWEST, posinf=0.0).clamp_(min=LOWEST)
    return Scores(values=values, ids=torch.cat([rank, best.indices], dim=1), num_top=num_top)


def score_prompt(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    asked: PromptRows,
    *,
    slice_rows: int,
) -> Scores:
    """Score the tokens of prompts, `slice_rows` at a time: all logits at once may be gigabytes."""
    device = str(hidden.device)
    places = to_device(asked.places, torch.int64, device)
    targets = to_device(asked.target_ids, torch.int64, device)
    parts = []
    for begin in range(0, len(asked.places), slice_rows):
        own = slice(begin, begin + slice_rows)
        logits = logits_of(hidden.index_select(0, places[own]))
        # As many of the best for every slice, so that they can be put together.
        num_top = [max(asked.num_top)] * logits.shape[0]
        parts.append(score(logits.float().log_softmax(-1), targets[own], num_top))
    return Scores(
        values=torch.cat([part.values for part in parts]),
        ids=torch.cat([part.ids for part in parts]),
        num_top=asked.num_top,
    )


@define(kw_only=True)
class Kept:
    """The log-probabilities of the asking rows of a step, until their tokens are sampled."""

    sequence_ids: list[int]
    num_top: list[int]
    places: Tensor
    logprobs: Tensor

    def score(self, token_ids: Tensor) -> Scores:
        """Look up the sampled tokens, [rows of the step]."""
        own = token_ids.index_select(0, self.places)
        return score(self.logprobs, own, self.num_top)


class LogprobRows:
    """Which persistent rows ask for the log-probabilities of their tokens, and for how many."""

    def __init__(self, device: torch.device) -> None:
        self._device = str(device)
        self._num_top: dict[int, int] = {}

    def add(self, added: AddedSequence) -> None:
        """Take over what a sequence asks for that takes a row."""
        num_top = added.params.logprobs
        if added.num_candidates:
            num_top = max(num_top or 0, added.num_candidates)
        if num_top is None:
            self._num_top.pop(added.row, None)
        else:
            self._num_top[added.row] = num_top

    def asks(self, rows: list[int]) -> bool:
        """Whether any of these rows wants log-probabilities."""
        return bool(self._num_top) and any(row in self._num_top for row in rows)

    def keep(self, logits: Tensor, rows: list[int], sequence_ids: list[int]) -> Kept | None:
        """Return what the asking rows need of the untouched logits, None where none asks."""
        if not self._num_top:
            return None
        asking = [i for i, row in enumerate(rows) if row in self._num_top]
        if not asking:
            return None
        places = to_device(asking, torch.int64, self._device)
        return Kept(
            sequence_ids=[sequence_ids[i] for i in asking],
            num_top=[self._num_top[rows[i]] for i in asking],
            places=places,
            logprobs=logits.index_select(0, places).float().log_softmax(-1),
        )
