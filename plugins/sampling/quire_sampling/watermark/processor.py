"""Favour a secret part of the vocabulary, another one after each token, so that a text tells."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.interfaces.sampling import LogitsProcessor, LogitsState
from quire.request import SamplingParams
from quire_kernels import ops
from quire_sampling.rows import AskingRows, Number, numbers_of

NUMBERS = {
    "gamma": Number(default=0.25, low=0.01, high=0.99),
    "delta": Number(default=2.0, low=0.0, high=100.0),
    "key": Number(default=0, low=0, high=2**53, is_whole=True),
}
# A sampler's draws have 0 here: with its seed as the key, too, these are others.
PURPOSE = 1


def green_lists(before: Tensor, vocab_size: int, gamma: Tensor, key: Tensor) -> Tensor:
    """Return which tokens are green after the tokens `before`: bool [num_rows, vocab_size].

    `before` and `key` are int64 [num_rows], `gamma` float64 [num_rows]. Token t is green if lane
    t % 4 of Philox4x32-10 for counter (t // 4, before, 0, 1) and the key is below gamma * 2**32;
    so a detector needs to look at the tokens that a text has, and at no others.
    """
    quads = torch.arange((vocab_size + 3) // 4, device=before.device)[None, :]
    zero = torch.zeros_like(before)[:, None]
    counter = (quads, before[:, None], zero, zero + PURPOSE)
    lanes = torch.stack(ops.philox_4x32(counter, key[:, None]), dim=-1).flatten(1)
    return lanes[:, :vocab_size] < (gamma * 2.0**32)[:, None]


class Watermark(LogitsProcessor):
    """Add delta to the logits of the share gamma of the tokens that the token before makes green.

    Each token is green by a hash of its own, where the paper permutes the whole vocabulary: the
    share is gamma on average.
    Source: Kirchenbauer et al., "A watermark for large language models", ICML 2023, algorithm 2.
    """

    name: ClassVar[str] = "watermark"
    batch_invariant: ClassVar[bool] = True

    def __init__(self, vocab_size: int, max_num_seqs: int, device: str) -> None:
        super().__init__(vocab_size, max_num_seqs, device)
        self._asking = AskingRows(tuple(NUMBERS), max_num_seqs, device)

    @classmethod
    def check_arguments(cls, arguments: Any, params: SamplingParams) -> None:
        """Take `{"gamma": 0.25, "delta": 2.0, "key": 0}`, each of them optional."""
        numbers_of(cls.name, arguments, NUMBERS)

    def add_row(self, row: int, arguments: Any, params: SamplingParams) -> None:
        """Begin to serve a row."""
        asks = arguments is not None
        self._asking.put(row, numbers_of(self.name, arguments, NUMBERS) if asks else None)

    def remove_row(self, row: int) -> None:
        """Forget a row."""
        self._asking.put(row, None)

    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        """Raise the green tokens of the rows that ask."""
        for chosen in self._asking.choose(state.host_rows):
            last = state.num_tokens.index_select(0, chosen.rows).long() - 1
            before = state.token_history[chosen.rows, last].long()
            gamma, key = (self._asking.column(name, chosen)[:, 0] for name in ("gamma", "key"))
            green = green_lists(before, self.vocab_size, gamma, key.long())
            own = logits.index_select(0, chosen.places).float()
            own += green * self._asking.column("delta", chosen).float()
            logits.index_copy_(0, chosen.places, own.to(logits.dtype))
        return logits
