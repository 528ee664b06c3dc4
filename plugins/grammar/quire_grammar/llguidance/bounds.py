"""Bounds that llguidance keeps too loosely: written as bounds that it keeps, or refused.

With `{"exclusiveMinimum": 5, "maximum": 5.5}` llguidance 1.9 allows the number 5, and with its
mirror image, `{"minimum": -5.5, "exclusiveMaximum": -5}`, -5: where the other bound lies within
the same whole number. The two may stand in different parts of a schema (`allOf`, `$ref`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

# Keywords of what is to be written as it stands, and is no schema.
VALUES = ("const", "enum", "default", "examples")
LOWER, UPPER = ("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")
# Numbers nearer to an exclusive bound than this share of it, or this itself, are given up.
GAP = 1e-12
LARGEST = 2**63 - 1


def with_exact_bounds(schema: Any) -> Any:
    """Return a schema, itself where nothing is to be changed, whose exclusive bounds are kept.

    Raises: ValueError for a number of properties that is not kept.
    """
    _check_counts(schema)
    bounds = list(_bounds(schema))
    for name, value in bounds:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"keyword {name!r} with a whole number of more than 64 bits")
    uppers = [value for name, value in bounds if name in UPPER]
    lowers = [value for name, value in bounds if name in LOWER]
    loose = {
        (name, value)
        for name, value in bounds
        if (name == LOWER[0] and any(_within(value, other) for other in uppers))
        or (name == UPPER[0] and any(_within(-value, -other) for other in lowers))
    }
    return _changed(schema, loose) if loose else schema


def _check_counts(part: Any) -> None:
    """Refuse to count names that are not required: one that is written twice is one property."""
    if isinstance(part, list):
        for one in part:
            _check_counts(one)
    if not isinstance(part, Mapping):
        return
    least, required = part.get("minProperties"), part.get("required")
    named = len(required) if isinstance(required, list) else 0
    if isinstance(least, (int, float)) and least > max(1, named):
        raise ValueError(
            f"keyword 'minProperties' of {least} is supported up to the number of required "
            f"properties, here {named}"
        )
    for name, value in part.items():
        if name not in VALUES:
            _check_counts(value)


def _within(whole: float, other: float) -> bool:
    return whole == math.floor(whole) and whole < other < whole + 1


def _bounds(part: Any) -> Iterator[tuple[str, float]]:
    """Yield all bounds, and what may be only a value of that name, in any part of a schema."""
    if isinstance(part, Mapping):
        for name, value in part.items():
            if name in (*LOWER, *UPPER) and type(value) in (int, float):
                yield name, value
            yield from _bounds(value)
    elif isinstance(part, list):
        for one in part:
            yield from _bounds(one)


def _changed(part: Any, loose: set[tuple[str, float]]) -> Any:
    if isinstance(part, list):
        return [_changed(one, loose) for one in part]
    if not isinstance(part, Mapping):
        return part
    found = {
        name: value if name in VALUES else _changed(value, loose) for name, value in part.items()
    }
    for (exclusive, inclusive), sign, nearest in ((LOWER, 1, max), (UPPER, -1, min)):
        value = found.get(exclusive)
        if isinstance(value, (int, float)) and (exclusive, value) in loose:
            beyond = value + sign * max(GAP, GAP * abs(value))
            found[inclusive] = nearest(beyond, found.get(inclusive, beyond))
            del found[exclusive]
    return found
