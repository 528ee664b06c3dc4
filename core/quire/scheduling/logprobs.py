"""Put a step's log-probabilities into its updates, and gather those of prompts over chunks."""

from __future__ import annotations

from quire.request import SequenceUpdate
from quire.scheduling.output import StepResult
from quire.scheduling.sequence import Sequence, SequenceStatus
from quire.scheduling.step import Step


def add_logprobs(step: Step, result: StepResult, updates: list[SequenceUpdate]) -> None:
    """Give each update with tokens the log-probabilities that its request asks for."""
    for sequence, _ in step.unfinished_chunks:
        if sequence.status is not SequenceStatus.FINISHED:
            sequence.prompt_logprobs += result.prompt_logprobs.get(sequence.sequence_id, ())
    by_key = {(u.request_id, u.index): u for u in updates if u.token_ids}
    for sequence in step.sampled:
        update = by_key.get((sequence.request_id, sequence.index))
        if update is not None:
            _add_to(update, sequence, result)


def _add_to(update: SequenceUpdate, sequence: Sequence, result: StepResult) -> None:
    sequence_id = sequence.sequence_id
    if sequence_id in result.logprobs:
        update.logprobs = (result.logprobs[sequence_id],)
    if sequence_id in result.prompt_logprobs:
        # This step computed the prompt's end: nothing more will come.
        last = result.prompt_logprobs[sequence_id]
        update.prompt_logprobs = (None, *sequence.prompt_logprobs, *last)
        sequence.prompt_logprobs = []
