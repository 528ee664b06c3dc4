"""A step between its launch and the arrival of its tokens on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import Factory, define
from torch import Tensor

from quire.execution.batch_builder import BuiltBatch, PromptRows
from quire.execution.logprobs import Scores
from quire.interfaces.sampling import RowStatus
from quire.request import TokenLogprobs

ROW_ERRORS = {
    RowStatus.NOT_FINITE: "the model's logits are not finite (NaN or infinity)",
    RowStatus.OUT_OF_RANGE: "the sampler gave a token id outside the vocabulary",
}


@define(kw_only=True)
class Forwarded:
    """A step whose forward pass was launched; its tokens are still to be sampled.

    `tokens` are there where they were sampled in the same graph: int32 [2, rows], then status.
    `end` gives them in another graph, where all that is left is to forbid tokens and to sample.
    """

    step_id: int
    built: BuiltBatch
    logits: Tensor | None
    prompt_scores: Scores | None = None
    tokens: Tensor | None = None
    end: Callable[[], Tensor] | None = None


@define(kw_only=True)
class InFlight:
    """A step that was dispatched; `ready` comes when all is on the host that it wants to know.

    `token_ids` are [rows, k], of which a row has `num_tokens`, by default all.
    """

    step_id: int
    sampled_ids: list[int]
    token_ids: Tensor | None = None
    num_tokens: Tensor | None = None
    status: Tensor | None = None
    scored_ids: list[int] = Factory(list)
    scores: Scores | None = None
    prompt: PromptRows | None = None
    prompt_scores: Scores | None = None
    ready: torch.cuda.Event | None = None

    def take_tokens(self, tokens: Tensor) -> None:
        """Start the one copy of tokens and status, before the next step writes them again."""
        host = _to_host(tokens) if tokens.is_cuda else tokens.clone()
        token_ids, self.status = host[:, : len(self.sampled_ids)]
        self.token_ids = token_ids.unsqueeze(1)

    def send_to_host(self) -> None:
        """Start the copies of all that the host wants to know, and mark where they end."""
        for name in ("token_ids", "num_tokens", "status"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.is_cuda:
                setattr(self, name, _to_host(tensor))
        for scores in (self.scores, self.prompt_scores):
            if scores is not None:
                scores.values, scores.ids = _to_host(scores.values), _to_host(scores.ids)
        # Also for a step without tokens: its staging buffer is written again after `collect`.
        self.ready = torch.cuda.Event()
        self.ready.record()

    # Once all is on the host

    def tokens_and_errors(self, vocab_size: int) -> tuple[dict[int, list[int]], dict[int, str]]:
        """Return the tokens of each sequence, and what is wrong with those that have none."""
        assert self.token_ids is not None, "rows were sampled"
        assert self.status is not None, "rows were sampled"
        # By numpy, which takes half the time for so few numbers.
        token_ids, statuses = self.token_ids.numpy(), self.status.numpy()
        drawn: list[list[int]] = token_ids.tolist()
        if self.num_tokens is not None:
            counts = self.num_tokens.tolist()
            drawn = [ids[:n] for ids, n in zip(drawn, counts, strict=True)]
        is_right = not statuses.any() and token_ids.min() >= 0 and token_ids.max() < vocab_size
        if is_right:
            return dict(zip(self.sampled_ids, drawn, strict=True)), {}
        tokens: dict[int, list[int]] = {}
        errors: dict[int, str] = {}
        found = zip(self.sampled_ids, drawn, statuses.tolist(), strict=True)
        for sequence_id, ids, status in found:
            if status == RowStatus.OK and not all(0 <= t < vocab_size for t in ids):
                status = RowStatus.OUT_OF_RANGE
            if status == RowStatus.OK:
                tokens[sequence_id] = ids
            else:
                errors[sequence_id] = ROW_ERRORS[RowStatus(status)]
        return tokens, errors

    def sampled_entries(self) -> dict[int, TokenLogprobs]:
        """Return the log-probabilities of sampled tokens, of the sequences that asked."""
        if self.scores is None:
            return {}
        return dict(zip(self.scored_ids, self.scores.entries(), strict=True))

    def prompt_entries(self) -> dict[int, list[TokenLogprobs]]:
        """Return a prompt's entries by sequence; where nothing was scored a list is empty."""
        if self.prompt is None:
            return {}
        entries = [] if self.prompt_scores is None else self.prompt_scores.entries()
        found, begin = {}, 0
        for sequence_id, count in self.prompt.counts.items():
            found[sequence_id] = entries[begin : begin + count]
            begin += count
        return found


def _to_host(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
