"""From what a user gives to a Request: the one layer of checks behind every door.

Bounds come before work, the first wrong thing ends the check, and no message repeats the input at
length. Nothing that passes here can raise inside a step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

from attrs import evolve, frozen

from quire.constraints import StructuredOutputsParams
from quire.errors import RequestError
from quire.pooling_params import PoolingParams
from quire.pooling_setup import CLASSIFY
from quire.request import Request, SamplingParams
from quire.text.beam_checks import check_beam_search
from quire.text.json_files import shorten
from quire.text.pooling_input import ContextLengthError as ContextLengthError
from quire.text.pooling_input import PoolingInputs, TextPair
from quire.text.token_bans import bad_words_token_ids, check_tokens_left
from quire.text.tokenizer import Tokenizer

MAX_CACHE_SALT_CHARS = 128
MAX_REQUEST_ID_CHARS = 128
PRIORITY_BITS = 64
SEED_BITS_DRAWN = 63
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_NO_SAMPLING = SamplingParams(max_tokens=1, detokenize=False)
PROMPT_FORMS = 'a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": [...]}'


@frozen
class RenderedChat:
    """A prompt that a chat template wrote: the begin token must not be added a second time."""

    text: str


@frozen(kw_only=True)
class RequestLimits:
    """What the running engine allows. `vocab_size` is the model's."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    has_priorities: bool = False


@frozen(kw_only=True)
class _Prompt:
    text: str | None = None
    token_ids: Any = None
    cache_salt: Any = None
    is_chat: bool = False


class InputProcessor:
    """Builds requests. Safe for threads. `seed` starts the seeds of unseeded requests.

    `check_grammar` raises RequestError for a form of answers that cannot be honoured.
    """

    def __init__(
        self,
        limits: RequestLimits,
        *,
        tokenizer: Tokenizer | None,
        seed: int = 0,
        check_grammar: Callable[[StructuredOutputsParams], None] | None = None,
        pooling: PoolingInputs | None = None,
    ) -> None:
        self._pooling = pooling
        self._check_grammar = check_grammar
        self._limits = limits
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        # generation_config.json may name ids that the model does not have: they never come.
        self._eos = frozenset(i for i in limits.eos_token_ids if 0 <= i < limits.vocab_size)

    def process(
        self,
        prompt: Any,
        params: SamplingParams | PoolingParams,
        *,
        request_id: str,
        arrival_s: float = 0.0,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Request:
        """Return the checked request; with PoolingParams one for a vector or scores.

        `max_tokens` above what the context leaves is lowered to it, as vLLM does; None means all
        that it leaves. Raises: RequestError, naming the parameter.
        """
        check_request_id(request_id)
        self._check_priority(priority)
        own = {"request_id": request_id, "arrival_s": arrival_s, "priority": priority}
        if isinstance(params, PoolingParams):
            return self._pooled(prompt, params, cache_salt, own)
        if self._pooling is not None:
            raise generates_nothing(self._pooling.setup.task)
        if not isinstance(params, SamplingParams):
            kind = type(params).__name__
            raise RequestError(
                f"sampling_params is a {kind}; allowed: SamplingParams.",
                parameter="sampling_params",
            )
        return self._generating(prompt, copy(params), cache_salt, own)

    def _generating(
        self, prompt: Any, params: SamplingParams, cache_salt: str | None, own: Mapping[str, Any]
    ) -> Request:
        """Return the request for tokens; `params` are its own. Raises: RequestError."""
        parsed = _parse_prompt(prompt)
        salt = _checked_salt(cache_salt if cache_salt is not None else parsed.cache_salt)
        self._check_params(params)
        token_ids: Any = self.token_ids_of(prompt, self._longest_prompt(params))
        room = self._limits.max_model_len - len(token_ids)
        eos = frozenset() if params.ignore_eos else self._eos
        stops = eos | frozenset(params.stop_token_ids)
        check_beam_search(params, vocab_size=self._limits.vocab_size, num_stops=len(stops))
        bad_words = bad_words_token_ids(params.bad_words, self._tokenizer)
        check_tokens_left(params, bad_words, stops, self._limits.vocab_size)
        chooses = params.num_sequences > params.n
        return Request(
            prompt_token_ids=token_ids,
            params=_with_all_sequences(params) if chooses else params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=self._draw_seed() if params.seed is None else params.seed,
            eos_token_ids=eos,
            stop_token_ids=stops,
            bad_words_token_ids=bad_words,
            cache_salt=salt,
            num_best=params.n if chooses else None,
            hides_logprobs=chooses and params.logprobs is None,
            **own,
        )

    def _pooled(
        self, prompt: Any, params: PoolingParams, cache_salt: str | None, own: Mapping[str, Any]
    ) -> Request:
        """Return the request for a vector. Raises: RequestError, ContextLengthError."""
        if self._pooling is None:
            raise gives_no_vectors()
        if not isinstance(prompt, TextPair):
            parsed = _parse_prompt(prompt)
            cache_salt = parsed.cache_salt if cache_salt is None else cache_salt
            prompt = parsed.text if parsed.token_ids is None else parsed.token_ids
            if not prompt:
                raise RequestError("input is empty; give a text or token ids.", parameter="input")
        salt = _checked_salt(cache_salt)
        token_ids: Any
        token_ids, asked, fits = self._pooling.tokens(prompt, params)
        if not token_ids:
            raise RequestError("input has no tokens; give another text.", parameter="input")
        if not fits:
            raise self._pooling.too_long(f"{len(token_ids)} tokens")
        _check_token_ids(token_ids, self._limits.vocab_size, "input")
        return Request(
            prompt_token_ids=token_ids,
            params=_NO_SAMPLING,
            max_tokens=1,
            seed=0,
            cache_salt=salt,
            pooling=asked,
            **own,
        )

    def token_ids_of(self, prompt: Any, longest: int | None = None) -> tuple[int, ...]:
        """Return a prompt's checked token ids; each is in the vocabulary and an answer fits.

        Of more than `longest` the last ones are kept, and a text's begin token before them.
        Raises: RequestError, ContextLengthError.
        """
        parsed = _parse_prompt(prompt)
        token_ids = self._tokenize(parsed) if parsed.token_ids is None else parsed.token_ids
        if not token_ids:
            raise _prompt_error("prompt is empty; give at least one token.")
        if longest is not None and len(token_ids) > longest:
            _check_token_ids(token_ids, self._limits.vocab_size)
            token_ids = self._shortened(token_ids, longest, is_text=parsed.token_ids is None)
        if len(token_ids) >= self._limits.max_model_len:
            raise self._too_long(f"{len(token_ids)} tokens")
        _check_token_ids(token_ids, self._limits.vocab_size)
        return tuple(token_ids)

    def _longest_prompt(self, params: SamplingParams) -> int | None:
        """Return how many tokens of a prompt are kept, None for all."""
        longest, context = params.truncate_prompt_tokens, self._limits.max_model_len
        if longest == -1:
            return context - 1  # an answer has a token
        if longest is not None and longest > context:
            raise RequestError(
                f"truncate_prompt_tokens is {shorten(longest)}; allowed: up to the context's "
                f"{context} tokens, or -1.",
                parameter="truncate_prompt_tokens",
            )
        return longest

    def _shortened(self, token_ids: Sequence[int], longest: int, *, is_text: bool) -> list[int]:
        tokenizer = self._tokenizer
        begins = is_text and tokenizer is not None and tokenizer.adds_bos
        head = list(token_ids[:1]) if begins else []
        return head + list(token_ids[len(token_ids) - longest + len(head) :])

    def _tokenize(self, prompt: _Prompt) -> list[int]:
        assert prompt.text is not None, "a prompt is text or ids"
        if self._tokenizer is None:
            raise _prompt_error("prompt is text, but there is no tokenizer; give token ids.")
        if not prompt.text:
            raise _prompt_error("prompt is empty; give at least one character.")
        # No token spells more characters than the longest one, so a text so long cannot fit:
        # refused without the work of tokenizing it. (Only a normalizer that drops most of a text
        # could make it fit; the bound is several times what ordinary text needs.)
        max_chars = self._limits.max_model_len * self._tokenizer.longest_token_chars
        if len(prompt.text) > max_chars:
            raise self._too_long(f"{len(prompt.text)} characters")
        encode = self._tokenizer.encode_chat if prompt.is_chat else self._tokenizer.encode
        return encode(prompt.text)

    def _too_long(self, size: str) -> ContextLengthError:
        return ContextLengthError(
            f"prompt has {size}, but the context is {self._limits.max_model_len} tokens for "
            "prompt and answer together; shorten the prompt or raise --max-model-len.",
            parameter="prompt",
        )

    def _check_priority(self, priority: Any) -> None:
        bound = 2 ** (PRIORITY_BITS - 1)
        is_whole = isinstance(priority, int) and not isinstance(priority, bool)
        if not is_whole or not -bound <= priority < bound:
            raise RequestError(
                f"priority is {shorten(priority)}; allowed: {PRIORITY_BITS}-bit whole numbers.",
                parameter="priority",
            )
        if priority and not self._limits.has_priorities:
            raise RequestError(
                f"priority is {priority}, but the scheduling policy is fcfs; "
                "start with --scheduling-policy priority, or leave it at 0.",
                parameter="priority",
            )

    def _check_params(self, params: SamplingParams) -> None:
        vocab_size = self._limits.vocab_size
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids", "forbidden_token_ids"):
            token_ids = getattr(params, name)
            if token_ids and max(token_ids) >= vocab_size:
                wrong = next(token_id for token_id in token_ids if token_id >= vocab_size)
                raise RequestError(
                    f"{name} has {shorten(wrong)}; allowed: 0 to {vocab_size - 1}.",
                    parameter=name,
                )
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer.", parameter="stop")
        self._check_structured(params)

    def _check_structured(self, params: SamplingParams) -> None:
        asked = params.structured_outputs
        if asked is None:
            return
        if params.ignore_eos:
            raise asked.error("says where the answer ends; leave ignore_eos out")
        if params.beam_search is not None:
            raise asked.error("cannot limit a beam search; leave one of them out")
        if params.min_tokens:
            raise asked.error("says where the answer ends; leave min_tokens out")
        if asked.is_json and (params.stop or params.stop_token_ids):
            raise asked.error("asks for JSON, which a stop would cut; leave stop out")
        if self._check_grammar is None:
            raise asked.error("needs a grammar engine")
        self._check_grammar(asked)

    def _draw_seed(self) -> int:
        return self._random.getrandbits(SEED_BITS_DRAWN)


def _with_all_sequences(params: SamplingParams) -> SamplingParams:
    """Return what the engine is asked where the best of several sequences are returned."""
    logprobs = 0 if params.logprobs is None else params.logprobs
    return evolve(params, n=params.num_sequences, best_of=None, logprobs=logprobs)


def prompt_text(prompt: Any) -> str | None:
    """Return the text of a prompt that has one, for `RequestOutput.prompt`."""
    if isinstance(prompt, TextPair):
        return None
    return _parse_prompt(prompt).text


def generates_nothing(task: str) -> RequestError:
    """Return the error where tokens are asked of a model that gives vectors or scores."""
    gives, instead = "embeddings", "LLM.embed or /v1/embeddings"
    if task == CLASSIFY:
        gives, instead = "scores", "LLM.classify, LLM.score, /v1/classify, /v1/score or /v1/rerank"
    return RequestError(
        f"this model is served for {gives} (--task {task}) and nothing else; use {instead}.",
        parameter="model",
    )


def gives_no_vectors() -> RequestError:
    """Return the error where a vector is asked of a model that generates."""
    return RequestError(
        "this model is served to generate; start it with --task embed for embeddings, or take one "
        "that embeds or classifies.",
        parameter="model",
    )


def _prompt_error(message: str, name: str = "prompt") -> RequestError:
    return RequestError(message, parameter=name)


def _parse_prompt(prompt: Any) -> _Prompt:
    if isinstance(prompt, str):
        return _Prompt(text=prompt)
    if isinstance(prompt, RenderedChat):
        return _Prompt(text=prompt.text, is_chat=True)
    if isinstance(prompt, (list, tuple)):
        return _Prompt(token_ids=prompt)
    if not isinstance(prompt, Mapping):
        raise _prompt_error(f"prompt is a {type(prompt).__name__}; allowed: {PROMPT_FORMS}.")
    return _parse_mapping(prompt)


def _parse_mapping(prompt: Mapping[Any, Any]) -> _Prompt:
    for key, value in prompt.items():
        if key not in PROMPT_KEYS and value is not None:
            raise _prompt_error(f"prompt has {shorten(key)}; allowed: {', '.join(PROMPT_KEYS)}.")
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and token_ids is None:
        raise _prompt_error(f"prompt has neither text nor token ids; allowed: {PROMPT_FORMS}.")
    if text is not None and not isinstance(text, str):
        raise _prompt_error(f"prompt is a {type(text).__name__}; allowed: a text.")
    if token_ids is not None and not isinstance(token_ids, (list, tuple)):
        kind = type(token_ids).__name__
        raise _prompt_error(f"prompt_token_ids is a {kind}; allowed: a list of token ids.")
    return _Prompt(text=text, token_ids=token_ids, cache_salt=prompt.get("cache_salt"))


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, name: str = "prompt") -> None:
    """Refuse the first id that is not in the vocabulary; the usual case runs in C."""
    is_whole = set(map(type, token_ids)) == {int}
    if is_whole and min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    for position, token_id in enumerate(token_ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise _prompt_error(
                f"{name} has {shorten(token_id)} at position {position}; "
                f"allowed: token ids from 0 to {vocab_size - 1}.",
                name,
            )


def check_request_id(request_id: Any) -> None:
    """Raise RequestError for an id that cannot be logged as it is."""
    if (
        not isinstance(request_id, str)
        or not 0 < len(request_id) <= MAX_REQUEST_ID_CHARS
        or not (request_id.isascii() and request_id.isprintable())
    ):
        raise RequestError(
            f"request_id is {shorten(request_id)}; allowed: 1 to {MAX_REQUEST_ID_CHARS} "
            "printable ASCII characters.",
            parameter="request_id",
        )


def _checked_salt(salt: Any) -> str:
    if salt is None:
        return ""
    if not isinstance(salt, str) or not 0 < len(salt) <= MAX_CACHE_SALT_CHARS:
        raise RequestError(
            f"cache_salt is {shorten(salt)}; allowed: a text of 1 to {MAX_CACHE_SALT_CHARS} "
            "characters.",
            parameter="cache_salt",
        )
    return salt
