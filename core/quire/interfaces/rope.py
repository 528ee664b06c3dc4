"""How a model rotates queries and keys by position, as config.json says it. Never imports torch.

Two spellings are read: the dictionary `rope_parameters`, and `rope_theta` with `rope_scaling`.
`quire.layers.rotary` makes the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from attrs import field, frozen

from quire.errors import ConfigError
from quire.interfaces.model_config import is_real, is_whole, key, refuse, shown

# rope_type -> (keys that must be there, keys that may be there)
_KEYS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset({"original_max_position_embeddings", "attention_factor", "beta_fast"})
        | {"beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": (
        frozenset({"short_factor", "long_factor"}),
        frozenset({"original_max_position_embeddings", "attention_factor", "factor"}),
    ),
}
_ALWAYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
_MAY_BE_NULL = {"yarn": frozenset({"factor"})}
_HAS_ORIGINAL_LENGTH = frozenset({"llama3", "yarn", "longrope"})


def _part(check: Callable[[Any], bool], allowed: str, default: Any = None) -> Any:
    return field(default=default, metadata={"check": check, "allowed": allowed})


def _number(default: float | None = None, *, above: float = 0.0, high: float = 1e12) -> Any:
    def check(value: Any) -> bool:
        return is_real(value) and above < value <= high

    return _part(check, f"numbers above {above:g} up to {high:g}", default)


def _length(default: int | None = None) -> Any:
    def check(value: Any) -> bool:
        return is_whole(value) and 2 <= value <= 2**30

    return _part(check, f"whole numbers from 2 to {2**30}", default)


def _are_factors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(is_real(v) and v > 0 for v in value)


@frozen(kw_only=True)
class RopeParameters:
    """The parameters of one rotary embedding; fields keep Hugging Face's names.

    None stands for a field that the type does not use or that was left to its default.
    `original_max_position_embeddings` is resolved for the types that use it. Lengths are in
    tokens. `warnings` are sentences about entries that the type does not use.
    """

    rope_type: str = "default"
    rope_theta: float = _number(10_000.0, above=1.0)
    partial_rotary_factor: float = _number(1.0, high=1.0)
    max_position_embeddings: int = _part(
        lambda v: is_whole(v) and 1 <= v <= 2**30, f"whole numbers from 1 to {2**30}", 2048
    )
    original_max_position_embeddings: int | None = _length()
    factor: float | None = _number(high=1e6)
    low_freq_factor: float | None = _number(high=1e6)
    high_freq_factor: float | None = _number(high=1e6)
    attention_factor: float | None = _number(high=1e6)
    beta_fast: float | None = _number(high=1e6)
    beta_slow: float | None = _number(high=1e6)
    mscale: float | None = _number(high=1e6)
    mscale_all_dim: float | None = _number(high=1e6)
    truncate: bool = _part(lambda v: isinstance(v, bool), "true or false", True)
    short_factor: tuple[float, ...] | None = _part(_are_factors, "a list of numbers above 0")
    long_factor: tuple[float, ...] | None = _part(_are_factors, "a list of numbers above 0")
    warnings: tuple[str, ...] = field(default=(), eq=False, metadata={"check": None})

    @classmethod
    def from_json(
        cls,
        given: Mapping[str, Any],
        *,
        source: str = "config.json",
        default_theta: float = 10_000.0,
        partial: bool = False,
    ) -> RopeParameters:
        """Read either spelling from all keys of config.json, `max_position_embeddings` included.

        `partial` says whether the model may rotate only a part of each head.
        Raises: ConfigError naming file and key.
        """
        where, entries = _entries(given, source)
        entries.setdefault("rope_theta", given.get("rope_theta", default_theta))
        if given.get("partial_rotary_factor") is not None:
            entries.setdefault("partial_rotary_factor", given["partial_rotary_factor"])
        rope_type = _rope_type(entries, source, where)
        length = given["max_position_embeddings"]
        values = {"rope_type": rope_type, "max_position_embeddings": length}
        required, optional = _KEYS[rope_type]
        for name in sorted(required - set(entries)):
            raise ConfigError(
                f"{source}: {where} has no {name}, which rope_type {shown(rope_type)} needs."
            )
        for name in (required | optional | _ALWAYS - {"type", "rope_type"}) & set(entries):
            if entries[name] is not None or name in required or name == "rope_theta":
                values[name] = entries[name]
        if rope_type in _HAS_ORIGINAL_LENGTH:
            _set_original_length(values, given, length)
        _check_values(values, source, where)
        unused = sorted(set(entries) - required - optional - _ALWAYS)
        warnings = tuple(
            f"{source}: {where}.{name} is not used by rope_type {shown(rope_type)}."
            for name in unused
        )
        rope = cls(warnings=warnings, **_with_tuples(values))
        if not partial and rope.partial_rotary_factor != 1:
            whole_head = "1: this architecture rotates whole heads"
            raise refuse(source, "partial_rotary_factor", rope.partial_rotary_factor, whole_head)
        return rope

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many of a head's first dimensions are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    def check_head_dim(self, head_dim: int, source: str) -> None:
        """Raise ConfigError unless heads of this size can be rotated."""
        dim = self.rotary_dim(head_dim)
        if dim < 2 or dim % 2 or (self.rope_type == "dynamic" and dim < 4):
            raise refuse(source, "head_dim", head_dim, "sizes with an even number to rotate")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != dim // 2:
                raise ConfigError(
                    f"{source}: {name} has {len(factors)} numbers; allowed: {dim // 2}, half of "
                    f"the rotated head."
                )

    @property
    def context_factor(self) -> float:
        """How many times longer than the original the context is meant to be."""
        if self.factor is not None:
            return self.factor
        original = self.original_max_position_embeddings or self.max_position_embeddings
        return self.max_position_embeddings / original

    @property
    def longest_context(self) -> int:
        """The longest context that the scaling is made for, in tokens."""
        scaled = 0.0
        if self.rope_type in ("linear", "dynamic"):
            scaled = self.max_position_embeddings * self.context_factor
        elif self.rope_type == "yarn":
            scaled = (self.original_max_position_embeddings or 0) * self.context_factor
        return max(self.max_position_embeddings, min(int(scaled), 2**30))

    @property
    def attention_scaling(self) -> float:
        """What cosines and sines are multiplied by.

        Source: Peng et al., "YaRN", 2023, 3.4; Ding et al., "LongRoPE", 2024.
        """
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.context_factor
        if self.rope_type not in ("yarn", "longrope") or factor <= 1:
            return 1.0
        if self.rope_type == "longrope":
            original = self.original_max_position_embeddings or self.max_position_embeddings
            return math.sqrt(1 + math.log(factor) / math.log(original))
        if self.mscale and self.mscale_all_dim:
            return _yarn_scale(factor, self.mscale) / _yarn_scale(factor, self.mscale_all_dim)
        return _yarn_scale(factor, 1.0)


def rope_key(
    *,
    default_theta: float = 10_000.0,
    partial: bool = False,
    names: tuple[str, ...] = (),
    adapt: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None,
    default: Mapping[str, Any] | None = None,
) -> Any:
    """Declare a model's rotary embedding, in both spellings, as a field of a `ModelConfig`.

    `adapt(json, source)` turns the keys of a family's files, `names` among them, into those that
    `RopeParameters.from_json` reads. `default` is the dictionary of a file that has none.
    """

    def parse(given: Mapping[str, Any], source: str) -> RopeParameters:
        if default and not (given.get("rope_scaling") or given.get("rope_parameters")):
            given = {**given, "rope_parameters": default}
        return RopeParameters.from_json(
            given if adapt is None else adapt(given, source),
            source=source,
            default_theta=default_theta,
            partial=partial,
        )

    return key(
        RopeParameters(rope_theta=default_theta),
        check=lambda value: isinstance(value, RopeParameters),
        allowed="rotary parameters",
        names=(
            "rope_parameters",
            "rope_theta",
            "rope_scaling",
            "partial_rotary_factor",
            "original_max_position_embeddings",
            *names,
        ),
        parse=parse,
    )


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _entries(given: Mapping[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """Return the dictionary that counts, and its name; `rope_scaling` comes first."""
    for where in ("rope_scaling", "rope_parameters"):
        value = given.get(where)
        if value is not None and not isinstance(value, Mapping):
            raise refuse(source, where, value, "an object or null")
        if not value:
            continue
        for name, entry in value.items():
            if isinstance(entry, Mapping):
                raise ConfigError(
                    f"{source}: {where}.{name} is an object; allowed: one set of numbers for all "
                    f"layers."
                )
        return where, dict(value)
    return "rope_parameters", {}


def _rope_type(entries: Mapping[str, Any], source: str, where: str) -> str:
    named = "rope_type" if "rope_type" in entries or "type" not in entries else "type"
    rope_type = entries.get(named, "default")
    if not isinstance(rope_type, str) or rope_type not in _KEYS:
        raise refuse(source, f"{where}.{named}", rope_type, ", ".join(_KEYS))
    if entries.get("mrope_section") is not None:
        raise refuse(source, f"{where}.mrope_section", entries["mrope_section"], "null")
    return rope_type


def _set_original_length(values: dict[str, Any], given: Mapping[str, Any], length: Any) -> None:
    """Resolve `original_max_position_embeddings`; beside the dictionary it counts most."""
    name = "original_max_position_embeddings"
    if given.get(name) is not None:
        values[name] = given[name]
    values.setdefault(name, length)


def _check_values(values: Mapping[str, Any], source: str, where: str) -> None:
    for part in attrs.fields(RopeParameters):
        check = part.metadata.get("check")
        if check is None or part.name not in values:
            continue
        value = values[part.name]
        if value is None and part.name in _MAY_BE_NULL.get(values["rope_type"], ()):
            continue
        if not check(value):
            name = part.name if part.name == "max_position_embeddings" else f"{where}.{part.name}"
            raise refuse(source, name, value, part.metadata["allowed"])
    low, high = values.get("low_freq_factor"), values.get("high_freq_factor")
    if low is not None and high is not None and not low < high:
        raise refuse(source, f"{where}.low_freq_factor", low, f"below high_freq_factor, {high}")


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
