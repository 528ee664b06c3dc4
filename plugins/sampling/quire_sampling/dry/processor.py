"""Penalise tokens that would go on with a repetition, the more the longer it is already."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.interfaces.sampling import LogitsProcessor, LogitsState
from quire.request import SamplingParams
from quire_sampling.rows import AskingRows, Chosen, Number, numbers_of, refuse

LONGEST_MATCH = 50
MAX_BREAKERS = 1024
NO_TOKEN = -1
NUMBERS = {
    "multiplier": Number(default=0.8, low=0.0, high=100.0),
    "base": Number(default=1.75, low=1.0, high=4.0),
    "allowed_length": Number(default=2, low=1, high=LONGEST_MATCH, is_whole=True),
    "range": Number(default=1024, low=2, high=16384, is_whole=True),
}
BREAKERS = "sequence_breakers"


class Dry(LogitsProcessor):
    """Where the last L tokens stood before, followed by t, lower t's logit.

    By multiplier * base ** (L - allowed_length), for the longest such L from allowed_length on, at
    most 50. The last `range` tokens are looked at, prompt included; no repetition goes on across
    a token of `sequence_breakers` (token ids; unknown ones break nothing), and none is penalised.
    Source: p-e-w, "DRY: a modern repetition penalty", text-generation-webui 5677, 2024.
    """

    name: ClassVar[str] = "dry"

    def __init__(self, vocab_size: int, max_num_seqs: int, device: str) -> None:
        super().__init__(vocab_size, max_num_seqs, device)
        self._asking = AskingRows(tuple(NUMBERS), max_num_seqs, device)
        self._ranges: dict[int, int] = {}
        self._breaks: Tensor | None = None  # bool [max_num_seqs, vocab_size], once it is needed

    @classmethod
    def check_arguments(cls, arguments: Any, params: SamplingParams) -> None:
        """Take `{"multiplier": 0.8, "base": 1.75, ...}`, each of them optional."""
        numbers_of(cls.name, arguments, NUMBERS, (BREAKERS,))
        breakers_of(arguments)

    def add_row(self, row: int, arguments: Any, params: SamplingParams) -> None:
        """Begin to serve a row."""
        self.remove_row(row)
        if arguments is None:
            return
        numbers = numbers_of(self.name, arguments, NUMBERS, (BREAKERS,))
        self._asking.put(row, numbers)
        self._ranges[row] = numbers["range"]
        breakers = [token_id for token_id in breakers_of(arguments) if token_id < self.vocab_size]
        if breakers and self._breaks is None:
            shape = (self.max_num_seqs, self.vocab_size)
            self._breaks = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if self._breaks is not None:
            self._breaks[row] = False
            self._breaks[row, torch.tensor(breakers, dtype=torch.int64).to(self.device)] = True

    def remove_row(self, row: int) -> None:
        """Forget a row."""
        self._asking.put(row, None)
        self._ranges.pop(row, None)

    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        """Lower the tokens that repeat, in the rows that ask."""
        for chosen in self._asking.choose(state.host_rows):
            own = logits.index_select(0, chosen.places)
            self._lower(own, self._last_tokens(state, chosen), chosen)
            logits.index_copy_(0, chosen.places, own)
        return logits

    def _lower(self, own: Tensor, tokens: Tensor, chosen: Chosen) -> None:
        """Lower the chosen rows' logits where a token goes on with a repetition, in place."""
        followers = tokens[:, 1:].clamp(min=0)
        longest = torch.zeros(own.shape, dtype=torch.int32, device=own.device)
        longest.scatter_reduce_(1, followers, self._match_lengths(tokens, chosen), "amax")
        # A token that followed several times has the same number at all its places.
        lengths = longest.gather(1, followers)
        multiplier, base, allowed = (
            self._asking.column(name, chosen) for name in ("multiplier", "base", "allowed_length")
        )
        given = own.gather(1, followers)
        lowered = given.double() - multiplier * base ** (lengths - allowed)
        lowered = lowered.clamp(min=torch.finfo(own.dtype).min).to(own.dtype)
        # What is -inf already stays so, and NaN too.
        lowers = (lengths >= allowed) & (multiplier > 0) & given.isfinite()
        own.scatter_(1, followers, torch.where(lowers, lowered, given))

    def _last_tokens(self, state: LogitsState, chosen: Chosen) -> Tensor:
        """Return the last tokens, int64 [num_chosen, longest range]; none where there are fewer."""
        asked = max(self._ranges[row] for row in chosen.host_rows if row in self._ranges)
        width = max(min(asked, state.token_history.shape[1]), 2)
        counts = state.num_tokens.index_select(0, chosen.rows).long().unsqueeze(1)
        back = torch.arange(width, 0, -1, device=self.device).unsqueeze(0)
        is_there = (back <= counts) & (back <= self._asking.column("range", chosen))
        at = (counts - back).clamp(min=0)
        tokens = state.token_history[chosen.rows.unsqueeze(1), at].long()
        return tokens.where(is_there, NO_TOKEN)

    def _match_lengths(self, tokens: Tensor, chosen: Chosen) -> Tensor:
        """Return how many tokens up to each but the last equal the last ones, int32."""
        ends = tokens[:, :-1]
        blocked = tokens == NO_TOKEN
        if self._breaks is not None:
            breaks = self._breaks.index_select(0, chosen.rows)
            blocked = blocked | breaks.gather(1, tokens.clamp(min=0))
        # A token that ends a sequence is no repetition of it.
        goes_on = ~blocked[:, 1:]
        lengths = torch.zeros_like(ends, dtype=torch.int32)
        for k in range(min(LONGEST_MATCH, ends.shape[1])):
            same = torch.zeros_like(goes_on)
            last = slice(tokens.shape[1] - 1 - k, tokens.shape[1] - k)
            earlier = ends[:, : ends.shape[1] - k]
            same[:, k:] = (earlier == tokens[:, last]) & ~blocked[:, last]
            goes_on = goes_on & same
            lengths += goes_on
        return lengths


def breakers_of(arguments: Any) -> list[int]:
    """Return the token ids that part sequences. Raises: RequestError for what is none."""
    given = arguments.get(BREAKERS) if isinstance(arguments, dict) else None
    allowed = f"a list of up to {MAX_BREAKERS} token ids from 0"
    if given is None:
        return []
    if not isinstance(given, (list, tuple)) or len(given) > MAX_BREAKERS:
        raise refuse(f"dry.{BREAKERS}", given, allowed)
    for token_id in given:
        if type(token_id) is not int or token_id < 0:
            raise refuse(f"dry.{BREAKERS}", token_id, allowed)
    return list(given)
