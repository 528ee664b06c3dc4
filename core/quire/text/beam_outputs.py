"""From a request's output to what `LLM.beam_search` returns."""

from __future__ import annotations

from quire.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
from quire.request import CompletionOutput, FinishReason, RequestOutput
from quire.text.tokenizer import Tokenizer


def to_beam_output(
    output: RequestOutput, params: BeamSearchParams, tokenizer: Tokenizer | None
) -> BeamSearchOutput:
    """Return the sequences of a request that asked for a beam search, best first."""
    ended = (FinishReason.STOP.value, FinishReason.LENGTH.value)
    prompt = output.prompt
    if prompt is None and tokenizer is not None:
        prompt = tokenizer.decode(output.prompt_token_ids)
    return BeamSearchOutput(
        [
            _sequence(completion, output.prompt_token_ids, prompt, params)
            for completion in output.outputs
            if completion.finish_reason in ended
        ]
    )


def _sequence(
    completion: CompletionOutput,
    prompt_token_ids: list[int],
    prompt: str | None,
    params: BeamSearchParams,
) -> BeamSearchSequence:
    token_ids, logprobs = completion.token_ids, completion.logprobs
    cumulative = completion.cumulative_logprob
    assert logprobs is not None, "a search asks for log-probabilities"
    assert cumulative is not None, "log-probabilities have a sum"
    score = cumulative / len(token_ids) ** params.length_penalty
    is_hidden = completion.finish_reason == FinishReason.STOP.value
    if is_hidden and not params.include_stop_str_in_output:
        token_ids = token_ids[:-1]
    return BeamSearchSequence(
        tokens=[*prompt_token_ids, *token_ids],
        logprobs=logprobs,
        cum_logprob=cumulative,
        score=score,
        text=None if prompt is None else prompt + completion.text,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
    )
