r"""Classes of characters, `\w` and its like, as every dialect means them.

JSON Schema's patterns are ECMAScript's, and validators in Python read them as Python's: `\W` has
`é` in the one and not in the other. What is allowed is what both allow. Source: ECMA-262, 22.2;
Python's `re`; Unicode's classes as the library has them.
"""

from __future__ import annotations

from collections.abc import Iterable

# What one dialect or another has in a class.
WIDE = {
    "s": r"\s\x1c-\x1f\x{feff}",
    "w": r"\p{L}\p{N}\p{M}\p{Pc}\x{200c}\x{200d}",
    "d": r"\p{Nd}",
}
# Of regexes by themselves `\w` has marks, which Python's has not, and `\d` digits that are newer
# than a Python's Unicode.
NARROW = {"w": r"[\p{L}0-9_]", "d": "[0-9]"}

ANY_NAME = "(?s)^"
MAX_NAME = 256


def other_than(names: Iterable[str], prefixes: Iterable[str] = ()) -> str:
    """Return a pattern of every text but some, and but those that begin with a prefix.

    Raises: ValueError for a long one.
    """
    begins = tuple(prefixes)
    known = sorted({name for name in names if not name.startswith(begins)} | set(begins))
    if any(len(name) > MAX_NAME for name in known):
        raise ValueError(f"keyword 'properties' with a name of more than {MAX_NAME} characters")
    return f"^{_other_than(known, begins, '')}$"


def _other_than(ends: list[str], prefixes: tuple[str, ...], before: str) -> str:
    """Return what, behind some text, is none of some sorted ends, which differ."""
    is_end = ends[:1] == [""]
    ends = ends[is_end:]
    if not ends:
        return "(?s:.+)" if is_end else "(?s:.*)"
    firsts = sorted({end[0] for end in ends})
    inner = []
    for first in firsts:
        if not (before + first).startswith(prefixes):
            own = [end[1:] for end in ends if end[0] == first]
            inner.append(_literal(first) + _other_than(own, prefixes, before + first))
    others = f"[^{''.join(map(_literal, firsts))}](?s:.*)"
    return f"(?:{'|'.join([*inner, others])}){'' if is_end else '?'}"


def _literal(character: str) -> str:
    return rf"\x{{{ord(character):x}}}"


def exact_pattern(pattern: str) -> str:
    """Return a JSON schema's pattern whose classes have what they have in every dialect."""
    return _rewritten(pattern, {})


def exact_regex(pattern: str) -> str:
    """Return a regex whose classes have what they have in every dialect."""
    return _rewritten(pattern, NARROW)


def _rewritten(pattern: str, narrow: dict[str, str]) -> str:
    parts: list[str] = []
    is_negated: list[bool] = []  # of the sets around a place
    position = 0
    while position < len(pattern):
        part = pattern[position : position + (2 if pattern[position] == "\\" else 1)]
        if part == "\\":
            raise ValueError("regex ends in a backslash that escapes nothing")
        if part == "[":
            is_negated.append(pattern.startswith("[^", position))
            if is_negated[-1]:
                part = "[^"
            if pattern.startswith("]", position + len(part)):  # the first one is itself
                part += "]"
        elif part == "]" and is_negated:
            is_negated.pop()
        parts.append(_class(part, narrow, is_wanted=sum(is_negated) % 2 == 0))
        position += len(part)
    return "".join(parts)


def _class(part: str, narrow: dict[str, str], *, is_wanted: bool) -> str:
    r"""Return a class with fewer characters where they are wanted, with more where they are not."""
    letter = part[1:] if part[0] == "\\" else ""
    if is_wanted and letter.lower() in WIDE and letter.isupper():
        return f"[^{WIDE[letter.lower()]}]"
    if not is_wanted and letter in WIDE:
        return f"[{WIDE[letter]}]"
    return narrow.get(letter, part) if is_wanted else part
