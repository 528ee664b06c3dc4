"""config.json as a declaration: which keys a model honours, their defaults and their ranges.

A key that is not declared is harmless, or an error if it changes the maths, or else a warning.
Never imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import attrs
from attrs import field, frozen

from quire.errors import ConfigError
from quire.interfaces.config_keys import HARMLESS_KEYS, MATHS_KEYS

_NUM_LABELS = 2  # scores that a head gives where nobody says how many, as in Transformers
Parse = Callable[[Mapping[str, Any], str], Any]


def shown(value: Any) -> str:
    """Return a value as config.json spells it, cut to 60 characters."""
    try:
        text = json.dumps(value, allow_nan=True)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse(source: str, name: str, value: Any, allowed: str) -> ConfigError:
    """Return the error for a key whose value is not allowed."""
    return ConfigError(f"{source}: {name} is {shown(value)}; allowed: {allowed}.")


def key(
    default: Any,
    *,
    check: Callable[[Any], bool],
    allowed: str,
    names: Sequence[str] = (),
    parse: Parse | None = None,
) -> Any:
    """Declare a key of config.json as a field of a `ModelConfig`.

    `check` answers whether a value is allowed and `allowed` says it. `names` are the JSON keys
    where they differ from the field's name; the first one given counts. `parse(json, source)`
    makes the value, where a plain look-up is not enough, also if no key is given: it sees all
    keys of the file and, where they are missing, the defaults of those without a `parse`. If
    its result has `warnings`, the config repeats them.
    """

    def validate(instance: ModelConfig, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not check(value):
            raise refuse(instance.source, _json_names(attribute)[0], value, allowed)

    metadata = {"key": True, "names": tuple(names), "parse": parse, "allowed": allowed}
    return field(default=default, validator=validate, metadata=metadata)


def whole(
    default: int | None, low: int, high: int, *, optional: bool = False, names: Sequence[str] = ()
) -> Any:
    """Declare a key that holds a whole number; with `optional`, or null."""

    def check(value: Any) -> bool:
        return (optional and value is None) or (is_whole(value) and low <= value <= high)

    allowed = f"whole numbers from {low} to {high}{' or null' if optional else ''}"
    return key(default, check=check, allowed=allowed, names=names)


def real(
    default: float | None,
    low: float,
    high: float,
    *,
    optional: bool = False,
    names: Sequence[str] = (),
) -> Any:
    """Declare a key that holds a number; with `optional`, or null."""

    def check(value: Any) -> bool:
        return (optional and value is None) or (is_real(value) and low <= value <= high)

    allowed = f"numbers from {low} to {high}{' or null' if optional else ''}"
    return key(default, check=check, allowed=allowed, names=names)


def flag(default: bool, *, names: Sequence[str] = ()) -> Any:
    """Declare a key that is true or false."""
    return key(default, check=_is_flag, allowed="true or false", names=names)


def absent(*, names: Sequence[str] = ()) -> Any:
    """Declare a key that files may say false or null of, since no such model has it."""
    return key(None, check=lambda v: v is None or v is False, allowed="false, null", names=names)


def one_of(default: str | None, choices: Sequence[str | None], *, names: Sequence[str] = ()) -> Any:
    """Declare a key of which only some values are honoured."""

    def check(value: Any) -> bool:
        return (value is None or isinstance(value, str)) and value in choices

    return key(default, check=check, allowed=", ".join(map(shown, choices)), names=names)


def is_whole(value: Any) -> bool:
    """Answer whether the value is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Answer whether the value is a finite number."""
    return (is_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _json_names(attribute: attrs.Attribute[Any]) -> tuple[str, ...]:
    return attribute.metadata["names"] or (attribute.name,)


def _parse_dtype(given: Mapping[str, Any], source: str) -> Any:
    value = given.get("dtype")
    return given.get("torch_dtype") if value is None else value


_DTYPES = (None, "float32", "bfloat16", "float16")


def _is_dtype(value: Any) -> bool:
    return (value is None or isinstance(value, str)) and value in _DTYPES


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(is_whole(v) and v >= 0 for v in value)


def end_tokens(*default: int) -> Any:
    """Declare `eos_token_id`: one id, several or null."""

    def parse(given: Mapping[str, Any], source: str) -> Any:
        value = given.get("eos_token_id", default)
        if isinstance(value, (list, tuple)):
            return tuple(value)
        return () if value is None else (value,)

    return key(
        default,
        check=_are_token_ids,
        allowed="a token id, a list of token ids, or null",
        names=("eos_token_id",),
        parse=parse,
    )


def _is_number_of_labels(value: Any) -> bool:
    return is_whole(value) and 1 <= value <= 2**17


def _parse_labels(given: Mapping[str, Any], source: str) -> Any:
    # Where scores are wanted the core checks the names; elsewhere nobody reads them.
    names, count = given.get("id2label"), given.get("num_labels")
    if isinstance(names, Mapping) and names:
        return len(names)
    return count if _is_number_of_labels(count) else _NUM_LABELS


@frozen(kw_only=True)
class ModelConfig:
    """What the core reads of config.json; a model's own class adds its keys with `key`.

    Fields keep Hugging Face's names and hold what the file says; properties hold what follows
    from it. `source` names the file in errors. `warnings` are sentences about keys that nobody
    knows, to be shown to the user.
    """

    source: str = "config.json"
    warnings: tuple[str, ...] = ()

    vocab_size: int = whole(32000, 1, 2**24)
    hidden_size: int = whole(4096, 1, 2**17)
    num_hidden_layers: int = whole(32, 1, 1024)
    max_position_embeddings: int = whole(2048, 1, 2**30)
    tie_word_embeddings: bool = flag(False)
    eos_token_ids: tuple[int, ...] = end_tokens()
    dtype: str | None = key(
        None,
        check=_is_dtype,
        allowed=", ".join(map(shown, _DTYPES)),
        names=("dtype", "torch_dtype"),
        parse=_parse_dtype,
    )
    num_labels: int = key(
        _NUM_LABELS,
        check=_is_number_of_labels,
        allowed="whole numbers from 1",
        names=("num_labels", "id2label"),
        parse=_parse_labels,
    )

    @classmethod
    def from_json(cls, given: Any, *, source: str = "config.json") -> Self:
        """Read the keys of a parsed config.json; `warnings` of the result names unknown ones.

        Raises: ConfigError naming file and key, for a value of a wrong type or out of range, and
        for a key that changes the maths and is not declared.
        """
        if not isinstance(given, Mapping):
            raise ConfigError(f"{source}: holds {shown(given)}; it must hold a JSON object.")
        plain = [a for a in _declared(cls) if a.metadata["parse"] is None]
        complete = {name: a.default for a in plain for name in _json_names(a)} | dict(given)
        values: dict[str, Any] = {}
        for attribute in _declared(cls):
            parse = attribute.metadata["parse"]
            present = [name for name in _json_names(attribute) if name in given]
            if parse is not None:
                values[attribute.name] = parse(complete, source)
            elif present:
                values[attribute.name] = given[present[0]]
        warnings = list(_check_undeclared(cls, given, source))
        for value in values.values():
            warnings.extend(getattr(value, "warnings", ()))
        return cls(source=source, warnings=tuple(warnings), **values)

    @classmethod
    def keys(cls) -> frozenset[str]:
        """Return the JSON keys that this class declares."""
        return frozenset(name for a in _declared(cls) for name in _json_names(a))

    def __attrs_post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check what several keys say together. Raises: ConfigError by `refuse`."""

    @property
    def max_model_len(self) -> int:
        """The longest context unless the user asks for another, in tokens."""
        return self.max_position_embeddings

    @property
    def longest_model_len(self) -> int:
        """The longest context that a user may ask for, in tokens."""
        return self.max_model_len

    @property
    def is_encoder(self) -> bool:
        """Whether nothing is kept of earlier tokens."""
        return self.kv_elements_per_token == 0

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token adds to the KV cache, of all layers.

        Where config.json has no key with "window" in its name, that is what a long sequence needs.
        0: an encoder, which sees all tokens of a sequence at once.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say its KV cache's size")


def _declared(cls: type[ModelConfig]) -> list[attrs.Attribute[Any]]:
    return [a for a in attrs.fields(cls) if a.metadata.get("key")]


def _check_undeclared(
    cls: type[ModelConfig], given: Mapping[str, Any], source: str
) -> Iterator[str]:
    declared = cls.keys()
    for name, value in given.items():
        if name in declared or name in HARMLESS_KEYS:
            continue
        if name not in MATHS_KEYS:
            yield (
                f"{source}: key {shown(name)} ({shown(value)}) is unknown to {cls.__name__} "
                f"and ignored."
            )
        elif not _is_neutral(value, MATHS_KEYS[name]):
            neutral = ", ".join(shown(v) for v in (None, *MATHS_KEYS[name]))
            raise ConfigError(
                f"{source}: {name} is {shown(value)}, which changes what the model computes and "
                f"is not honoured by {cls.__name__}; allowed: {neutral}."
            )


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if isinstance(value, list):
        return all(_is_neutral(entry, neutral) for entry in value)
    return value is None or value in neutral
