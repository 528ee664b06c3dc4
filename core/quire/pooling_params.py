"""What is asked where a model gives vectors or scores; names and fields follow vLLM's."""

from __future__ import annotations

from typing import Any

from attrs import evolve, field, frozen

from quire.request_checks import fail, truncate_prompt_tokens


def _optional_flag(_instance: object, attribute: Any, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise fail(attribute.name, value, "true, false, or None for the model's own")


def _size(_instance: object, attribute: Any, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and value >= 1):
        raise fail(attribute.name, value, "whole numbers from 1")


def _text(_instance: object, attribute: Any, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise fail(attribute.name, value, "a text")


@frozen(kw_only=True)
class PoolingParams:
    """How a prompt becomes a vector or scores; None is what the checkpoint says.

    `dimensions` keeps so many numbers of an embedding, normalised again where `normalize` says
    so. `use_activation`: softmax or sigmoid over scores. Of a prompt longer than
    `truncate_prompt_tokens` the first ones are kept, special tokens counted in; -1: as many as the
    model takes. `prompt` is put before a text, `prompt_name` names one of the checkpoint's.

    Raises: RequestError, naming the field, the value and what is allowed.
    """

    dimensions: int | None = field(default=None, validator=_size)
    normalize: bool | None = field(default=None, validator=_optional_flag)
    use_activation: bool | None = field(default=None, validator=_optional_flag)
    truncate_prompt_tokens: int | None = field(default=None, validator=truncate_prompt_tokens)
    prompt_name: str | None = field(default=None, validator=_text)
    prompt: str | None = field(default=None, validator=_text)

    def clone(self) -> PoolingParams:
        """Return an equal copy, as vLLM's scripts ask for."""
        return evolve(self)


@frozen(kw_only=True)
class PoolingInput:
    """What the engine has to know of a request for a vector.

    From token `second_at` on it is the second text of a pair. The first `num_skipped` tokens, a
    prompt's, are left out of the vector. With `is_whole` all are computed in one step.
    """

    second_at: int | None = None
    num_skipped: int = 0
    is_whole: bool = False
