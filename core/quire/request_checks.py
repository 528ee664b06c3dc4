"""Checks of the lists in SamplingParams, which may be long: the usual case runs in C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.errors import RequestError, shown

MAX_LOGIT_BIAS = 2**18
MAX_TOKEN_IDS = 2**18
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_BAD_WORD_TOKENS = 64


def fail(name: str, value: object, allowed: str) -> RequestError:
    """Return the error of a field: its name, a short form of the value, what is allowed."""
    return RequestError(f"{name} is {shown(value)}; allowed: {allowed}.", parameter=name)


def to_optional_tuple(value: Any) -> Any:
    """Return lists and sets as tuples; None says that nothing was given."""
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else value


def _to_token_id(key: Any) -> Any:
    """Return the id that OpenAI's clients write as a text; anything else stays as it is."""
    is_number = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
    return int(key) if is_number else key


def to_bias(value: Any) -> Any:
    """Return a logit bias by whole numbers, None for an empty one."""
    if value is None or (isinstance(value, (Mapping, list, tuple)) and not value):
        return None
    if not isinstance(value, Mapping) or len(value) > MAX_LOGIT_BIAS:
        return value
    bias = {_to_token_id(key): number for key, number in value.items()}
    if len(bias) < len(value):
        raise fail("logit_bias", "twice for one token", "each token id once")
    return bias


def logit_bias(_instance: object, attribute: Any, value: Any) -> None:
    """Take None, or numbers by token id."""
    allowed = f"up to {MAX_LOGIT_BIAS} token ids, each with a number from -100 to 100"
    if value is None:
        return
    if not isinstance(value, Mapping) or len(value) > MAX_LOGIT_BIAS:
        raise fail(attribute.name, type(value).__name__, allowed)
    for token_id, number in value.items():
        if type(token_id) is not int or token_id < 0:
            raise fail(attribute.name, token_id, allowed)
        # Not a comparison's opposite: NaN is refused too.
        if type(number) not in (int, float) or not -100 <= number <= 100:
            raise fail(attribute.name, number, allowed)


def allowed_token_ids(_instance: object, attribute: Any, value: Any) -> None:
    """Take None, or at least one token id."""
    if value is None:
        return
    allowed = f"1 to {MAX_TOKEN_IDS} token ids, whole numbers from 0; None allows all"
    if not value:
        raise fail(attribute.name, list(value) if value == () else value, allowed)
    _check_ids(attribute.name, value, allowed)


def forbidden_token_ids(_instance: object, attribute: Any, value: Any) -> None:
    """Take any number of token ids up to the limit."""
    _check_ids(attribute.name, value, f"up to {MAX_TOKEN_IDS} token ids, whole numbers from 0")


def _check_ids(name: str, value: Any, allowed: str) -> None:
    if not isinstance(value, tuple):
        raise fail(name, value, allowed)
    if len(value) > MAX_TOKEN_IDS:
        raise fail(name, f"{len(value)} entries", allowed)
    if not value or (set(map(type, value)) == {int} and min(value) >= 0):
        return
    wrong = next(one for one in value if type(one) is not int or one < 0)
    raise fail(name, wrong, allowed)


def bad_words(_instance: object, attribute: Any, value: Any) -> None:
    """Take texts that are more than white space."""
    allowed = (
        f"up to {MAX_BAD_WORDS} texts of 1 to {MAX_BAD_WORD_CHARS} characters, "
        "not of white space alone"
    )
    if not isinstance(value, tuple):
        raise fail(attribute.name, value, allowed)
    if len(value) > MAX_BAD_WORDS:
        raise fail(attribute.name, f"{len(value)} entries", allowed)
    for text in value:
        if not isinstance(text, str) or len(text) > MAX_BAD_WORD_CHARS or not text.strip():
            raise fail(attribute.name, text, allowed)


def truncate_prompt_tokens(_instance: object, attribute: Any, value: Any) -> None:
    """Take None, a length, or -1 for all that the model's length has room for."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and (not is_whole or (value < 1 and value != -1)):
        raise fail(attribute.name, value, "whole numbers from 1; -1 for the model's length")


def check_choices(n: int, best_of: int | None) -> None:
    """Refuse fewer sequences than are to be returned."""
    if best_of is not None and best_of < n:
        raise fail("best_of", best_of, f"at least n, {n}")


def check_tokens_left(allowed: Sequence[int] | None, forbidden: Sequence[int]) -> None:
    """Refuse to forbid all that is allowed."""
    if allowed is not None and forbidden and not set(allowed).difference(forbidden):
        raise RequestError(
            "forbidden_token_ids has all of allowed_token_ids, so that no token is left; "
            "forbid fewer.",
            parameter="forbidden_token_ids",
        )


NO_TOKEN_LEFT = (
    "allowed_token_ids, forbidden_token_ids and bad_words leave none of the tokens that its "
    "structured_outputs allow; forbid fewer."
)


def tokens_left(mask: Any, params: Any, more_forbidden: Sequence[int]) -> bool:
    """Whether a form's mask, int32 words of a bit a token, has any that may be drawn."""
    own = mask.view("uint32")

    def has(token_id: int) -> bool:
        return bool(own[token_id // 32] >> (token_id % 32) & 1)

    forbidden = {*params.forbidden_token_ids, *more_forbidden}
    if params.allowed_token_ids is not None:
        return any(has(i) for i in params.allowed_token_ids if i not in forbidden)
    count = int.from_bytes(mask.tobytes(), "little").bit_count()
    return count > sum(map(has, forbidden))
