"""Regexes that xgrammar matches as they are meant: it passes over some of what it cannot do."""

from __future__ import annotations

import re

from quire_grammar.xgrammar import character_sets as sets

# Above it xgrammar counts in another way, which forgets that it is within a JSON string.
MAX_COUNT = 128
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
NO_LINE_END = sets.without([(ord(one), ord(one)) for one in sets.LINE_ENDS])
MARKS = "()|*+?{}^$"


def exact_regex(pattern: str, *, in_json: bool = False) -> str:
    """Return a regex that xgrammar matches as this one is meant, or more narrowly.

    With `in_json` it is the pattern of a JSON string, in which nothing is escaped.
    Raises: ValueError for what it would match more loosely.
    """
    parts, position = [], 0
    while position < len(pattern):
        part, length = _part(pattern, position, in_json=in_json)
        parts.append(part)
        position += length
    return "".join(parts)


def _part(pattern: str, position: int, *, in_json: bool) -> tuple[str, int]:
    """Return what stands at a position, as xgrammar reads it, and its length."""
    character, length = pattern[position], 1
    if character == "[":
        ranges, end = sets.read_set(pattern, position)
        return sets.written(ranges, in_json=in_json), end - position
    if character == ".":
        return sets.written(NO_LINE_END, in_json=in_json), 1
    if character in MARKS:
        _check_mark(pattern, position)
        return character, 1
    if character == "\\":
        character, length = sets.read_escape(pattern, position)
    if len(character) > 1:
        return sets.written(sets.ranges_of(character), in_json=in_json), length
    if in_json and any(low <= ord(character) <= high for low, high in sets.ESCAPED):
        raise ValueError(f"regex character {character!r}, which JSON escapes, is not supported")
    return pattern[position : position + length], length


def _check_mark(pattern: str, position: int) -> None:
    """Refuse what is no part of a set of characters and would be passed over."""
    character = pattern[position]
    if character == "{":
        _check_count(pattern, position)
    elif pattern.startswith("(?", position) and not pattern.startswith("(?:", position):
        raise ValueError(f"regex group {pattern[position : position + 4]!r} is not supported")
    elif (character == "^" and position) or (character == "$" and pattern[position + 1 :]):
        raise ValueError(f"regex anchor {character!r} within a regex is not supported")


def _check_count(pattern: str, position: int) -> None:
    found = _COUNT.match(pattern, position)
    if found is None:
        raise ValueError("regex brace that begins no count is not supported; escape it")
    if any(int(number or 0) > MAX_COUNT for number in found.groups()):
        raise ValueError(f"regex count {found[0]!r} is not supported; allowed: up to {MAX_COUNT}")
