"""Regexes that xgrammar matches as they are meant: it passes over some of what it cannot do."""

from __future__ import annotations

import re

# Escapes whose characters are in their class in every dialect; those of \S, \W and \D are not.
LETTERS = "dwsnrtfv"
# Above it xgrammar counts in another way, which forgets that it is within a JSON string.
MAX_COUNT = 128
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
NO_LINE_END = r"[^\n\r\u2028\u2029]"  # what a dot means; xgrammar's matches line ends too
_HEX = re.compile(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4})")


def exact_regex(pattern: str) -> str:
    """Return a regex that xgrammar matches as this one is meant, or more narrowly.

    Raises: ValueError for what it would match more loosely.
    """
    parts, position, is_in_set, is_negated = [], 0, False, False
    while position < len(pattern):
        character = pattern[position]
        length = 1
        if character == "\\":
            length = _escape_length(pattern, position)
            if is_in_set and is_negated and pattern[position + 1] in "dws":
                raise ValueError(f"regex escape {pattern[position:][:2]!r} in [^ is not supported")
        elif is_in_set:
            is_in_set = character != "]"
        elif character == "[":
            is_in_set, is_negated = True, pattern.startswith("[^", position)
        else:
            _check_mark(pattern, position)
        is_any = character == "." and not is_in_set
        parts.append(NO_LINE_END if is_any else pattern[position : position + length])
        position += length
    return "".join(parts)


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


def _escape_length(pattern: str, position: int) -> int:
    found = _HEX.match(pattern, position)
    if found is not None:
        return len(found[0])
    character = pattern[position + 1 : position + 2]
    if not character or (character.isalnum() and character not in LETTERS):
        raise ValueError(f"regex escape '\\{character}' is not supported")
    return 2
