"""Bounds that llguidance keeps too loosely: written as bounds that it keeps, or refused.

With `{"exclusiveMinimum": 5, "maximum": 5.5}` llguidance 1.9 allows the number 5, and with its
mirror image, `{"minimum": -5.5, "exclusiveMaximum": -5}`, -5: where the other bound lies within
the same whole number. The two may stand in different parts of a schema (`allOf`, `$ref`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Keywords of what is to be written as it stands, and is no schema.
VALUES = ("const", "enum", "default", "examples")
# Of names that are no keywords.
TABLES = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
LOWER, UPPER = ("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")
# Numbers nearer to an exclusive bound than this share of it, or this itself, are given up.
GAP = 1e-12
LARGEST = 2**63 - 1


def mapped(schema: Any, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Any:
    """Return a schema of which every part, outer ones first, is what `change` makes of it.

    Itself where nothing is changed. Values, which are no schemas, stay as they are.
    """
    if isinstance(schema, list):
        changed: Any = [mapped(one, change) for one in schema]
    elif isinstance(schema, dict):
        changed = {name: _inner(name, value, change) for name, value in change(schema).items()}
    else:
        return schema
    return schema if changed == schema else changed


def _inner(name: str, value: Any, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Any:
    if name in VALUES:
        return value
    if name in TABLES and isinstance(value, dict):
        return {each: mapped(one, change) for each, one in value.items()}
    return mapped(value, change)


def with_exact_bounds(schema: Any) -> Any:
    """Return a schema, itself where nothing is to be changed, whose exclusive bounds are kept."""
    bounds = list(_bounds(schema))
    uppers = [value for name, value in bounds if name in UPPER]
    lowers = [value for name, value in bounds if name in LOWER]
    loose = {
        (name, value)
        for name, value in bounds
        if (name == LOWER[0] and any(_within(value, other) for other in uppers))
        or (name == UPPER[0] and any(_within(-value, -other) for other in lowers))
    }
    return mapped(schema, lambda part: _changed(part, loose)) if loose else schema


def _within(whole: float, other: float) -> bool:
    return whole == math.floor(whole) and whole < other < whole + 1


def _bounds(part: Any) -> Iterator[tuple[str, float]]:
    """Yield all bounds, and what may be only a value of that name, in any part of a schema."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name in (*LOWER, *UPPER) and type(value) in (int, float):
                yield name, value
            yield from _bounds(value)
    elif isinstance(part, list):
        for one in part:
            yield from _bounds(one)


def _changed(schema: Mapping[str, Any], loose: set[tuple[str, float]]) -> Mapping[str, Any]:
    found = dict(schema)
    for (exclusive, inclusive), sign, nearest in ((LOWER, 1, max), (UPPER, -1, min)):
        value = found.get(exclusive)
        if isinstance(value, (int, float)) and (exclusive, value) in loose:
            beyond = value + sign * max(GAP, GAP * abs(value))
            found[inclusive] = nearest(beyond, found.get(inclusive, beyond))
            del found[exclusive]
    return found
