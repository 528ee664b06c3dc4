"""Put log-probabilities and vectors into a step's updates, gathered over a prompt's chunks."""

from __future__ import annotations

from quire.request import FinishReason, SequenceUpdate
from quire.scheduling.output import StepResult
from quire.scheduling.sequence import Sequence, SequenceStatus
from quire.scheduling.step import Step


def add_extras(step: Step, result: StepResult, updates: list[SequenceUpdate]) -> None:
    """Give each update with tokens the log-probabilities or the vector that is asked for."""
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
    if sequence_id in result.pooled:
        # It stands for the token, which the scheduler has counted.
        update.pooled, update.token_ids = result.pooled[sequence_id], ()
        update.finish_reason, update.stop_reason = FinishReason.STOP, None
        return
    if sequence_id in result.logprobs:
        update.logprobs = (result.logprobs[sequence_id],)
    if sequence_id in result.prompt_logprobs:
        # This step computed the prompt's end: nothing more will come.
        last = result.prompt_logprobs[sequence_id]
        update.prompt_logprobs = (None, *sequence.prompt_logprobs, *last)
        sequence.prompt_logprobs = []
