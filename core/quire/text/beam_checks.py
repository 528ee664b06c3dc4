"""What a beam search can be asked together with."""

from __future__ import annotations

from quire.errors import RequestError
from quire.request import SAMPLING_FIELDS, SamplingParams

# All others are refused unless they ask for nothing.
HONOURED = frozenset(
    {
        *("n", "beam_search", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("include_stop_str_in_output", "detokenize", "skip_special_tokens", "logprobs"),
        *("spaces_between_special_tokens", "truncate_prompt_tokens"),
    }
)
# Beside the defaults.
NEUTRAL = {"temperature": (0, 1), "top_k": (-1,)}
_DEFAULTS = SamplingParams()


def check_beam_search(params: SamplingParams, *, vocab_size: int, num_stops: int) -> None:
    """Refuse what a beam search does not do. Raises: RequestError, naming the field."""
    if params.beam_search is None:
        return
    for name in SAMPLING_FIELDS:
        value, default = getattr(params, name), getattr(_DEFAULTS, name)
        if name not in HONOURED and value != default and value not in NEUTRAL.get(name, ()):
            raise RequestError(
                f"{name} cannot be used with beam search, which follows the model's own "
                f"probabilities; leave it at {default!r}.",
                parameter=name,
            )
    width = params.beam_search.beam_width
    if params.n > width:
        raise RequestError(
            f"n is {params.n}, above the beam width, {width}; lower it.", parameter="n"
        )
    if width + num_stops > vocab_size:
        raise RequestError(
            f"the beam width is {width}; allowed: up to {vocab_size - num_stops}, the "
            "vocabulary's tokens without those that end a sequence.",
            parameter="beam_width",
        )
