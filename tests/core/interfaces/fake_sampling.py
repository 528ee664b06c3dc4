"""A fake sampler and two fake logits processors, one on the device and one on the host."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.errors import RequestError
from quire.interfaces.sampling import (
    LogitsProcessor,
    LogitsState,
    RowStatus,
    SampledTokens,
    Sampler,
    SamplingBatch,
)
from quire.request import SamplingParams


class FakeSampler(Sampler):
    """Greedy, with room for a second token a row, probabilities and a status."""

    seen: ClassVar[list[SamplingBatch]] = []

    @classmethod
    def why_unsupported(cls, device: str) -> str | None:
        """Serve CPUs only."""
        return None if device == "cpu" else f"no kernels for {device}"

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """Check what the batch says and take the most likely tokens."""
        self.seen.append(batch)
        greedy = batch.temperature == 0
        assert batch.all_greedy == bool(greedy.all())
        assert batch.any_greedy == bool(greedy.any())
        assert batch.any_top_k == bool((batch.top_k[~greedy] < logits.shape[1]).any())
        assert batch.any_top_p == bool((batch.top_p[~greedy] < 1).any())
        assert batch.any_min_p == bool((batch.min_p[~greedy] > 0).any())
        for column in (batch.seed, batch.child_index, batch.position, batch.rows):
            assert column.shape == (len(logits),)
        if batch.suppressed is not None:
            logits[batch.suppressed] = float("-inf")
        best = logits.log_softmax(-1).topk(2)
        return SampledTokens(
            token_ids=best.indices,
            num_tokens=torch.ones(len(logits), dtype=torch.int32),
            status=torch.full((len(logits),), int(RowStatus.OK), dtype=torch.int32),
            logprobs=best.values,
        )


class HistoryProcessor(LogitsProcessor):
    """Forbid a token at once after itself, by the history on the device."""

    name = "fake-history"

    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        """Lower the last token of each row; the token in flight counts."""
        assert state.host_rows == state.rows.tolist()
        ends = state.num_tokens[state.rows] - 1
        assert (ends + 1 >= state.num_prompt_tokens[state.rows]).all()
        last = state.token_history[state.rows.long(), ends.long()]
        logits[torch.arange(len(logits)), last.long()] = -1e9
        return logits


class HostProcessor(LogitsProcessor):
    """Forbid the tokens that a request names once they are in its text, by the host's list."""

    name = "fake-host"
    needs_host_tokens = True

    def __init__(self, vocab_size: int, max_num_seqs: int, device: str) -> None:
        super().__init__(vocab_size, max_num_seqs, device)
        self.forbidden: dict[int, list[int]] = {}

    @classmethod
    def check_arguments(cls, arguments: Any, params: SamplingParams) -> None:
        """Take a list of token ids."""
        if not isinstance(arguments, list):
            raise RequestError("fake-host takes a list of token ids", parameter="extra_args")

    def add_row(self, row: int, arguments: Any, params: SamplingParams) -> None:
        """Remember what the row forbids."""
        self.forbidden[row] = arguments or []

    def remove_row(self, row: int) -> None:
        """Forget it."""
        del self.forbidden[row]

    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        """Drop the forbidden tokens that were there before."""
        for i, row in enumerate(state.host_rows):
            for token_id in set(state.host_token_ids[row]) & set(self.forbidden[row]):
                logits[i, token_id] = -1e9
        return logits
