"""Read and check keys of a checkpoint's `quantization_config`; every error names the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.errors import ConfigError

REMEDY = "Take a checkpoint that is quantized so, or the full-precision one."


def refuse(key: str, value: object, allowed: str) -> ConfigError:
    """Return the error for a value that is not served."""
    return ConfigError(f"quantization_config: {key} is {value!r}; served is {allowed}. {REMEDY}")


def value_of(config: Mapping[str, Any], names: Sequence[str], default: Any = None) -> Any:
    """Return the value of the first of several spellings of a key that is there, or the default."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    return default


def one_of(config: Mapping[str, Any], names: Sequence[str], allowed: Sequence[Any]) -> Any:
    """Return a value that must be given. Raises: ConfigError if it is none of those allowed."""
    value = value_of(config, names)
    # True is no number of bits, though it equals 1.
    if isinstance(value, bool) or value not in allowed:
        raise refuse(names[0], value, " or ".join(map(repr, allowed)))
    return value


def group_size_of(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Return the inputs of a group; None: all of a layer, which is written -1.

    Raises: ConfigError for what is neither -1 nor a positive multiple of 8.
    """
    value = value_of(config, names)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or (value != -1 and (value < 8 or value % 8)):
        raise refuse(names[0], value, "-1 or a positive multiple of 8")
    return None if value == -1 else value


def flag_of(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return true or false. Raises: ConfigError for anything else."""
    value = value_of(config, (name,), default)
    if not isinstance(value, bool):
        raise refuse(name, value, "true or false")
    return value


def names_of(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return names, none where the key is not given. Raises: ConfigError for anything else."""
    value = value_of(config, (name,), ())
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise refuse(name, value, "a list of module names")
    return tuple(value)


def multiple_needed(what: str, size: int, unit: int) -> str | None:
    """Return why a size is not served that is no multiple of `unit`, and the nearest that are."""
    if size % unit == 0:
        return None
    low, high = size // unit * unit, -(-size // unit) * unit
    near = f"{low} or {high}" if low else f"{high}"
    return f"{what} must be a multiple of {unit}; {size} is not, {near} would do"
