"""Sets of characters as ranges: xgrammar reads those exactly, and negated sets too widely.

Of what is negated it would take halves of surrogate pairs and other bytes that are no UTF-8, and
within a JSON string some characters that have to be escaped there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Range = tuple[int, int]

LAST = 0x10FFFF
SURROGATES: Range = (0xD800, 0xDFFF)
LINE_ENDS = "\n\r\u2028\u2029"
# What a JSON string has only as an escape; none is written where a string has a pattern.
ESCAPED: tuple[Range, ...] = ((0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\")))
LETTERS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
_SPACES = " \t\n\v\f\r\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
# What every dialect of regexes has in a class, and what one or another has.
NARROW: dict[str, tuple[Range, ...]] = {
    "d": ((48, 57),),
    "w": ((48, 57), (65, 90), (95, 95), (97, 122)),
    "s": (*((ord(one), ord(one)) for one in _SPACES), (0x2000, 0x200A)),
}
WIDE = {"s": (*NARROW["s"], (0x1C, 0x1F), (0x85, 0x85), (0xFEFF, 0xFEFF))}
_HEX = re.compile(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4})")


def without(removed: Iterable[Range]) -> list[Range]:
    """Return all characters but some."""
    found, begin = [], 0
    for low, high in sorted((*removed, SURROGATES)):
        if low > begin:
            found.append((begin, low - 1))
        begin = max(begin, high + 1)
    return [*found, (begin, LAST)] if begin <= LAST else found


def written(ranges: Iterable[Range], *, in_json: bool) -> str:
    """Return a set of a regex, of what may stand in a text. Raises: ValueError for none."""
    rest = without(without(ranges))
    kept = without((*without(rest), *ESCAPED)) if in_json else rest
    if not kept:
        raise ValueError("regex set of no character that xgrammar can write in a string")
    return f"[{''.join(f'{_escaped(low)}-{_escaped(high)}' for low, high in kept)}]"


def _escaped(code: int) -> str:
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 2**16 else chr(code)


def read_escape(pattern: str, position: int) -> tuple[str, int]:
    r"""Return what an escape stands for, a character or a class as `\d`, and its length.

    Raises: ValueError for one whose meaning is not known.
    """
    found = _HEX.match(pattern, position)
    if found is not None:
        return chr(int(found[0][2:], 16)), len(found[0])
    letter = pattern[position + 1 : position + 2]
    if letter in LETTERS:
        return LETTERS[letter], 2
    if letter and letter in "dwsS":
        return f"\\{letter}", 2
    if not letter or letter.isalnum():
        raise ValueError(f"regex escape '\\{letter}' is not supported")
    return letter, 2


def ranges_of(name: str, *, is_negated: bool = False) -> list[Range]:
    """Return a class's characters. Raises: ValueError where its negation is not known."""
    letter = name[1]
    if is_negated and letter not in WIDE:
        raise ValueError(f"regex escape {name!r} in [^ is not supported")
    if letter == "S":
        return without(WIDE["s"])
    return list((WIDE if is_negated else NARROW)[letter])


def read_set(pattern: str, position: int) -> tuple[list[Range], int]:
    """Return the characters of the set that begins at a position, and where it ends.

    Raises: ValueError.
    """
    is_negated = pattern.startswith("[^", position)
    position += 2 if is_negated else 1
    found: list[Range] = []
    while not pattern.startswith("]", position):
        one, position = _member(pattern, position)
        if len(one) > 1:
            found += ranges_of(one, is_negated=is_negated)
            continue
        last = one
        if pattern.startswith("-", position) and not pattern.startswith("-]", position):
            last, position = _member(pattern, position + 1)
        if len(last) > 1 or last < one:
            raise ValueError(f"regex set with a range from {one!r} to {last!r}")
        found.append((ord(one), ord(last)))
    if not found:
        raise ValueError("regex set without characters is not supported; escape its ]")
    return without(found) if is_negated else found, position + 1


def _member(pattern: str, position: int) -> tuple[str, int]:
    if position >= len(pattern):
        raise ValueError("regex set does not end")
    if pattern[position] != "\\":
        return pattern[position], position + 1
    meant, length = read_escape(pattern, position)
    return meant, position + length
