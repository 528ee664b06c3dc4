"""What is asked of the engine and what it answers. Names and fields follow vLLM's offline API."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import Factory, define, evolve, field, fields, frozen, setters

from quire import request_checks as checks
from quire.beam_search import BeamOptions, to_beam_options
from quire.constraints import StructuredOutputsParams, to_structured_outputs
from quire.errors import RequestError
from quire.pooling_params import PoolingInput

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 1024
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = checks.MAX_LOGIT_BIAS
MAX_LOGPROBS = 20
SEED_BITS = 64

_fail = checks.fail


class FinishReason(enum.StrEnum):
    """Why a sequence ended, with OpenAI's spelling where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def _number(low: float, high: float, allowed: str, *, low_open: bool = False) -> Any:
    def check(_instance: object, attribute: Any, value: Any) -> None:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not low <= value <= high or (low_open and value == low):
            raise _fail(attribute.name, value, allowed)

    return check


def _integer(low: int, high: int | None, allowed: str, *, optional: bool = False) -> Any:
    def check(_instance: object, attribute: Any, value: Any) -> None:
        if value is None and optional:
            return
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            raise _fail(attribute.name, value, allowed)

    return check


def _boolean(_instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, bool):
        raise _fail(attribute.name, value, "true or false")


def _to_strings(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _to_mapping(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _fail("extra_args", value, "a mapping from a logits processor's name to arguments")
    return value


def _to_tuple(value: Any) -> Any:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else value


def _stop_strings(_instance: object, attribute: Any, value: Any) -> None:
    allowed = f"up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters"
    if not isinstance(value, tuple) or len(value) > MAX_STOP_STRINGS:
        raise _fail(attribute.name, value, allowed)
    for text in value:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
            raise _fail(attribute.name, text, allowed)


def _token_ids(_instance: object, attribute: Any, value: Any) -> None:
    allowed = f"up to {MAX_STOP_TOKEN_IDS} token ids, whole numbers from 0"
    if not isinstance(value, tuple) or len(value) > MAX_STOP_TOKEN_IDS:
        raise _fail(attribute.name, value, allowed)
    for token_id in value:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise _fail(attribute.name, token_id, allowed)


_NUM_LOGPROBS = _integer(0, MAX_LOGPROBS, f"whole numbers from 0 to {MAX_LOGPROBS}", optional=True)


# Fields that have to fit together.
_TOGETHER = (
    *("min_tokens", "max_tokens", "stop", "detokenize", "n", "best_of"),
    *("allowed_token_ids", "forbidden_token_ids"),
)


def _checked_together(params: SamplingParams, attribute: Any, value: Any) -> Any:
    """Check a field that is set later against the others; the fields before have been checked."""
    if attribute.name in _TOGETHER:
        others = {name: getattr(params, name) for name in _TOGETHER}
        _check_together(**{**others, attribute.name: value})
    return value


def _check_together(
    *, min_tokens: int, max_tokens: int | None, stop: Any, detokenize: bool, **lists: Any
) -> None:
    if max_tokens is not None and min_tokens > max_tokens:
        raise _fail("min_tokens", min_tokens, f"at most max_tokens, {max_tokens}")
    if stop and not detokenize:
        raise RequestError("stop strings need detokenize=True.", parameter="stop")
    checks.check_choices(lists["n"], lists["best_of"])
    checks.check_tokens_left(lists["allowed_token_ids"], lists["forbidden_token_ids"])


@define(kw_only=True, on_setattr=[setters.convert, setters.validate, _checked_together])
class SamplingParams:
    """How to choose tokens and when to stop; every field is checked when it is set.

    A request keeps a copy: what is set later is for later requests, as with vLLM's.

    `presence_penalty` and `frequency_penalty` count generated tokens, `repetition_penalty` the
    prompt's too. `logprobs` and `prompt_logprobs` ask for the token's own log-probability and so
    many of the most likely ones, of the model's logits before anything changes them.

    `best_of` sequences are generated, and the `n` of the highest cumulative log-probability
    returned. `bad_words` are not said, neither within a word nor after a space; their tokens
    are looked for in what was generated. `truncate_prompt_tokens` keeps the prompt's last ones.
    With `beam_search` the `n` best sequences of a search are returned, all at its end.

    Raises: RequestError, naming the field, the value and what is allowed.
    """

    n: int = field(default=1, validator=_integer(1, MAX_N, f"whole numbers from 1 to {MAX_N}"))
    best_of: int | None = field(
        default=None,
        validator=_integer(1, MAX_N, f"whole numbers from n to {MAX_N}", optional=True),
    )
    temperature: float = field(
        default=1.0, validator=_number(0.0, 1e4, "finite numbers from 0 (0 is greedy)")
    )
    top_p: float = field(
        default=1.0, validator=_number(0.0, 1.0, "numbers above 0 up to 1", low_open=True)
    )
    top_k: int = field(
        default=0, validator=_integer(-1, None, "whole numbers from 1; 0 or -1 turns it off")
    )
    min_p: float = field(default=0.0, validator=_number(0.0, 1.0, "numbers from 0 to 1"))
    seed: int | None = field(
        default=None,
        validator=_integer(
            -(2 ** (SEED_BITS - 1)), 2**SEED_BITS - 1, "64-bit whole numbers", optional=True
        ),
    )
    stop: tuple[str, ...] = field(default=(), converter=_to_strings, validator=_stop_strings)
    stop_token_ids: tuple[int, ...] = field(default=(), converter=_to_tuple, validator=_token_ids)
    include_stop_str_in_output: bool = field(default=False, validator=_boolean)
    ignore_eos: bool = field(default=False, validator=_boolean)
    max_tokens: int | None = field(
        default=16, validator=_integer(1, None, "whole numbers from 1", optional=True)
    )
    min_tokens: int = field(default=0, validator=_integer(0, None, "whole numbers from 0"))
    detokenize: bool = field(default=True, validator=_boolean)
    skip_special_tokens: bool = field(default=True, validator=_boolean)
    spaces_between_special_tokens: bool = field(default=True, validator=_boolean)
    presence_penalty: float = field(
        default=0.0, validator=_number(-2.0, 2.0, "numbers from -2 to 2")
    )
    frequency_penalty: float = field(
        default=0.0, validator=_number(-2.0, 2.0, "numbers from -2 to 2")
    )
    repetition_penalty: float = field(
        default=1.0, validator=_number(1e-3, 1e3, "numbers from 0.001 to 1000")
    )
    logprobs: int | None = field(default=None, validator=_NUM_LOGPROBS)
    prompt_logprobs: int | None = field(default=None, validator=_NUM_LOGPROBS)
    logit_bias: Mapping[int, float] | None = field(
        default=None, converter=checks.to_bias, validator=checks.logit_bias
    )
    allowed_token_ids: Sequence[int] | None = field(
        default=None, converter=checks.to_optional_tuple, validator=checks.allowed_token_ids
    )
    forbidden_token_ids: Sequence[int] = field(
        default=(), converter=_to_tuple, validator=checks.forbidden_token_ids
    )
    bad_words: Sequence[str] = field(default=(), converter=_to_strings, validator=checks.bad_words)
    truncate_prompt_tokens: int | None = field(
        default=None, validator=checks.truncate_prompt_tokens
    )
    structured_outputs: StructuredOutputsParams | None = field(
        default=None, converter=to_structured_outputs
    )
    extra_args: Mapping[str, Any] = field(factory=dict, converter=_to_mapping)
    beam_search: BeamOptions | None = field(default=None, converter=to_beam_options)

    def __attrs_post_init__(self) -> None:
        _check_together(**{name: getattr(self, name) for name in _TOGETHER})

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken each time; so small a temperature rounds to it."""
        return self.temperature < 1e-5 or self.beam_search is not None

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes what is said next."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    @property
    def num_side_by_side(self) -> int:
        """How many sequences run at once: those to return, or the beams."""
        return self.n if self.beam_search is None else self.beam_search.beam_width

    @property
    def num_sequences(self) -> int:
        """How many sequences are generated."""
        return max(self.n, self.best_of or 0)

    @property
    def num_listed(self) -> int:
        """Entries of the lists that take time to check, or to tokenize."""
        lists = (self.allowed_token_ids or (), self.forbidden_token_ids, self.bad_words)
        return sum(map(len, lists))

    def clone(self) -> SamplingParams:
        """Return an equal copy, as vLLM's scripts ask for."""
        return evolve(self)

    def with_values(self, **changes: Any) -> SamplingParams:
        """Return a copy with other values, checked like the first."""
        return evolve(self, **changes)


SAMPLING_FIELDS: tuple[str, ...] = tuple(a.name for a in fields(SamplingParams))


@frozen(kw_only=True)
class Request:
    """One prompt for the engine, in token ids, already checked. The engine never sees text.

    `seed` is drawn at admission where the user gave none. `max_tokens` is the resolved limit:
    never above what the context leaves. `stop_token_ids` unites the end tokens (unless
    `ignore_eos`) with the user's own; `eos_token_ids` says which of them are not the user's.
    `bad_words_token_ids` are the tokens of `params.bad_words`. With `num_best` so many of the
    `params.n` sequences are returned, the most likely ones; `hides_logprobs` where they were
    asked for only to find these. With `pooling` its answer is a vector, and no token.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...] = field(converter=tuple)
    params: SamplingParams
    max_tokens: int
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    arrival_s: float = 0.0
    cache_salt: str = ""
    num_best: int | None = None
    hides_logprobs: bool = False
    pooling: PoolingInput | None = None


@define(kw_only=True)
class TokenLogprobs:
    """How likely a token was, and which were the most likely ones, best first.

    `rank` counts from 1. All numbers are finite: -9999.0 stands for what is as good as never.
    """

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


# Not frozen: one is made for each sequence and step, and freezing costs 1 us of the 1.8 us.
@define(kw_only=True)
class SequenceUpdate:
    """What one step gave one sequence: new tokens, and the reason if it ended.

    `stop_reason` is the stop token that ended it, None for an end token. `error` says in a
    sentence why a row failed. `num_cached_tokens` counts prompt tokens found in the prefix cache.
    `logprobs` has one entry a token. `prompt_logprobs` comes once, with the first token of index
    0: one entry a token of the prompt, None for the first. `pooled` is the vector that was asked
    for, or the scores, as float32 in the order of the bytes that x86 has.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    pooled: bytes | None = None


@frozen
class Logprob:
    """One token's log-probability. `rank` counts from 1, the most likely token's."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@frozen(kw_only=True)
class CompletionOutput:
    """One generated sequence of a request. The stop string or end token is not in `text`.

    `logprobs`, where they were asked for, is one dict a token: the chosen one first.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Return whether this sequence has ended; a method, as in vLLM."""
        return self.finish_reason is not None


@frozen(kw_only=True)
class RequestOutput:
    """A request and what was generated for it so far. `num_cached_tokens` counts prompt tokens.

    `pooled` is what embeddings and scores are made of, float32.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: Mapping[str, float] = Factory(dict)
    pooled: bytes | None = None
