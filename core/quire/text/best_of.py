"""Of several sequences the ones that the model finds most likely."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import evolve

from quire.request import CompletionOutput, FinishReason

FAILED = (FinishReason.ERROR, FinishReason.ABORT)


def most_likely(
    found: Sequence[CompletionOutput], count: int, *, hides_logprobs: bool
) -> list[CompletionOutput]:
    """Return `count` sequences by cumulative log-probability, the highest first, numbered anew.

    Of equal ones the earlier comes first; those that failed come last.
    """

    def rank(one: CompletionOutput) -> tuple[bool, float]:
        assert one.cumulative_logprob is not None, "best_of asks for log-probabilities"
        return one.finish_reason in FAILED, -one.cumulative_logprob

    best = sorted(found, key=rank)[:count]
    return [
        evolve(one, index=index, logprobs=None if hides_logprobs else one.logprobs)
        for index, one in enumerate(best)
    ]
