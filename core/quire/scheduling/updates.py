"""Updates that end a sequence, or might have."""

from __future__ import annotations

from quire.request import FinishReason, SequenceUpdate
from quire.scheduling.sequence import Sequence


def end_of(sequence: Sequence, token_id: int) -> FinishReason | None:
    """Return why a sequence ends with its last token, None if it goes on."""
    request = sequence.request
    num_generated = len(sequence.token_ids) - sequence.num_prompt_tokens
    if token_id in request.stop_token_ids and num_generated >= request.params.min_tokens:
        return FinishReason.STOP
    if len(sequence.token_ids) == sequence.max_num_tokens:
        return FinishReason.LENGTH
    return None


def last_update(sequence: Sequence, token_id: int, reason: FinishReason | None) -> SequenceUpdate:
    """Return the update for a token that may be the last one."""
    is_users = reason is FinishReason.STOP and token_id not in sequence.request.eos_token_ids
    return SequenceUpdate(
        request_id=sequence.request_id,
        index=sequence.index,
        token_ids=(token_id,),
        finish_reason=reason,
        stop_reason=token_id if is_users else None,
        num_cached_tokens=sequence.num_cached_tokens,
    )


def failed_update(sequence: Sequence, error: str) -> SequenceUpdate:
    """Return the update for a sequence whose row failed."""
    return SequenceUpdate(
        request_id=sequence.request_id,
        index=sequence.index,
        finish_reason=FinishReason.ERROR,
        error=error,
        num_cached_tokens=sequence.num_cached_tokens,
    )
