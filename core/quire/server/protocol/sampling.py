"""From a body's fields to SamplingParams: the checkpoint's defaults, overridden by the body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quire.constraints import StructuredOutputsParams
from quire.errors import RequestError
from quire.request import SamplingParams
from quire.server.protocol.beams import beam_values
from quire.server.protocol.fields import MAX_TOKEN_ID

if TYPE_CHECKING:
    from quire.server.protocol.generation import GenerationBody

SAME_NAME = (
    *("n", "temperature", "top_p", "stop", "seed", "logit_bias", "presence_penalty"),
    *("frequency_penalty", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos"),
    *("min_tokens", "skip_special_tokens", "include_stop_str_in_output", "best_of"),
    *("spaces_between_special_tokens", "allowed_token_ids", "forbidden_token_ids", "bad_words"),
    *("truncate_prompt_tokens", "extra_args"),
)


def sampling_values(body: GenerationBody, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of SamplingParams. Raises: RequestError, naming the body's field."""
    body.check()
    values = dict(defaults)
    given = {name: getattr(body, name, None) for name in SAME_NAME}
    given |= {"logprobs": body.num_logprobs, "prompt_logprobs": body.num_prompt_logprobs}
    if body.vllm_xargs is not None:
        given["extra_args"] = body.vllm_xargs
    form = body.form()
    if form is not None:
        given["structured_outputs"] = StructuredOutputsParams(**form)
    if body.top_k is not None:
        # More tokens than any vocabulary has are all tokens.
        given["top_k"] = min(body.top_k, MAX_TOKEN_ID)
    values |= {name: value for name, value in given.items() if value is not None}
    length = body.length_limit()[1]
    if length is not None:
        values["max_tokens"] = length
    else:
        values.setdefault("max_tokens", None)
    return beam_values(body, values) if body.use_beam_search else values


def sampling_params(body: GenerationBody, defaults: Mapping[str, Any]) -> SamplingParams:
    """Return the checked parameters. Raises: RequestError, naming the body's field."""
    values = sampling_values(body, defaults)
    try:
        return SamplingParams(**values)
    except RequestError as error:
        if error.parameter != "max_tokens":
            raise
        name = body.length_limit()[0]
        message = str(error).replace("max_tokens", name, 1)
        raise RequestError(message, parameter=name) from error
