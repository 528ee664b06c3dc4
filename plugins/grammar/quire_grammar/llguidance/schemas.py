"""JSON schemas for llguidance: what it would check more loosely is changed, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from quire.errors import shown
from quire_grammar.llguidance.bounds import LARGEST, LOWER, UPPER, mapped, with_exact_bounds
from quire_grammar.llguidance.formats import FORMATS
from quire_grammar.llguidance.regexes import ANY_NAME, exact_pattern, other_than

OWN_SETTINGS = "x-guidance"
# The library reads numbers as floats of 64 bits, which do not tell whole ones above it apart.
LARGEST_EXACT = 2**53
PREFIX = re.compile(r"\^([\w -]+)", re.ASCII)  # a pattern whose complement is known
# What a pointer in a URI may have beside letters and digits.
URI_MARKS = "/?:@!$&'()*+,;=%#[]~-._"


def exact_schema(schema: Any) -> Any:
    """Return a schema of which the library allows no more than it says, itself where it can.

    Raises: ValueError naming the keyword of what cannot be kept.
    """
    if schema is False:
        raise ValueError("nothing fulfils the schema false")
    if schema is True:
        return {}
    if OWN_SETTINGS in schema:
        raise ValueError(f"keyword {OWN_SETTINGS!r} is not supported")
    return with_exact_bounds(mapped(schema, _exact))


def _exact(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    _check_counts(schema)
    _check_numbers(schema)
    changed: dict[str, Any] = {}
    pattern, reference = schema.get("pattern"), schema.get("$ref")
    patterns = schema.get("patternProperties")
    if isinstance(pattern, str):
        changed["pattern"] = exact_pattern(pattern)
    if isinstance(patterns, dict):
        changed["patternProperties"] = {exact_pattern(one): patterns[one] for one in patterns}
    if isinstance(reference, str):
        changed["$ref"] = quote(reference, safe=URI_MARKS)
    changed |= _without_escaped_names(schema)
    found = {**schema, **changed}
    form = schema.get("format")
    if isinstance(form, str) and form in FORMATS:
        del found["format"]
        own, others = {"pattern": FORMATS[form]}, found.get("allOf", [])
        if pattern is None:
            found |= own
        elif isinstance(others, list):  # else the library says so
            found["allOf"] = [*others, own]
    return found


def _without_escaped_names(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords by which a further property is one by its name, however that is written.

    The library takes the listed names out of what it allows, but not `"\\u0061"` for `"a"`, unless
    further names come of a pattern: of those none is written so.
    """
    rest, names = schema.get("additionalProperties", True), schema.get("properties")
    patterns = schema.get("patternProperties") or {}
    if rest is False or not (names or patterns):
        return {}
    if not isinstance(names or {}, dict) or not isinstance(patterns, dict):
        return {}  # which the library refuses
    if patterns or rest not in (True, {}):
        others = other_than(names or (), [_prefix(pattern) for pattern in patterns])
    else:
        others = ANY_NAME
    return {"patternProperties": {**patterns, others: rest}, "additionalProperties": False}


def _prefix(pattern: str) -> str:
    found = PREFIX.fullmatch(pattern)
    if found is None:
        raise ValueError(
            f"keyword 'patternProperties' with {pattern[:60]!r} is kept beside "
            "additionalProperties false; others, with patterns such as '^x-'"
        )
    return found[1]


def _check_counts(schema: Mapping[str, Any]) -> None:
    """Refuse to count names that are not required: one that is written twice is one property."""
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, (int, float)) and least > max(1, named):
        raise ValueError(
            f"keyword 'minProperties' of {shown(least)} is supported up to the number of required "
            f"properties, here {named}"
        )


def _check_numbers(schema: Mapping[str, Any]) -> None:
    for name in ("const", "enum"):
        for number in _numbers(schema.get(name)):
            if abs(number) > LARGEST_EXACT:
                raise ValueError(f"keyword {name!r} with a number beyond 2^53, {shown(number)}")
    for name in (*LOWER, *UPPER):
        bound = schema.get(name)
        if type(bound) is int and not _is_kept(name, bound):
            raise ValueError(
                f"keyword {name!r} with a whole number that is not exact, {shown(bound)}"
            )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, (int, float)):
        yield value


def _is_kept(name: str, bound: int) -> bool:
    if abs(bound) <= LARGEST_EXACT:
        return True
    if (name, bound) == ("maximum", LARGEST):
        return True
    return "exclusive" not in name and abs(bound) < LARGEST and float(bound) == bound
