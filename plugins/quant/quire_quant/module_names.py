"""Which layers a `quantization_config` means: lists of names and patterns, as each tool reads them.

Shared by the methods of this package; not a plugin. Never imports torch.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

from quire.errors import ConfigError
from quire.interfaces.quantization import EmbeddingSpec, ExpertsSpec, LinearSpec

ROUTERS = ("gate", "router", "shared_expert_gate")


def part_names(spec: LinearSpec | EmbeddingSpec | ExpertsSpec) -> tuple[str, ...]:
    """Return the checkpoint's names of the projections that a layer fuses; else the layer's.

    Of experts, whose projections are all kept alike, those of the first and the last.
    """
    if isinstance(spec, ExpertsSpec):
        ends = (0, spec.num_experts - 1)
        return tuple(f"{spec.name}.{expert}.{part}" for expert in ends for part in spec.parts)
    if isinstance(spec, EmbeddingSpec) or len(spec.parts) < 2:
        return (spec.name,)
    prefix = spec.name.rpartition(".")[0]
    return tuple(f"{prefix}.{part}" if prefix else part for part in spec.parts)


def is_router(name: str) -> bool:
    """Answer whether a layer chooses experts: rounded weights would choose others."""
    return name.rpartition(".")[2] in ROUTERS


def names_in(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """Return the names that the first of `keys` lists. Raises: ConfigError if it is no list."""
    for key in keys:
        found = config.get(key)
        if found is None:
            continue
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ConfigError(f"quantization_config: {key} is {found!r}, not a list of names.")
        return tuple(found)
    return ()


def has_path(name: str, paths: Iterable[str]) -> bool:
    """Answer whether a path is the module's name, or whole components of it, one after another.

    Or whether an expression after `re:` matches from its beginning.
    """
    return any(
        re.match(_compiled(path), name) if path.startswith("re:") else f".{path}." in f".{name}."
        for path in paths
    )


def has_wildcard(name: str, patterns: Iterable[str]) -> bool:
    """Answer as `has_path`, or for a pattern with `*` that the whole name matches."""
    patterns = list(patterns)
    return has_path(name, patterns) or any(fnmatch.fnmatchcase(name, p) for p in patterns)


def is_target(name: str, targets: Iterable[str], *, kind: str | None = "Linear") -> bool:
    """Answer as compressed-tensors: a name, `re:` and an expression, or the class `kind`."""
    for target in targets:
        if target.startswith("re:"):
            if re.match(_compiled(target), name):
                return True
        elif target in (name, kind):
            return True
    return False


def _compiled(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise ConfigError(
            f"quantization_config: {target!r} is not a regular expression ({error})."
        ) from None
