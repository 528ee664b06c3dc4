"""Read grammars in GBNF, llama.cpp's form, for engines that do not read it themselves.

Names begin rules with `::=`; a rule is alternatives of texts, characters, groups and other rules,
each with `*`, `+`, `?` or `{m,n}` behind it. Source: llama.cpp's grammars/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from attrs import frozen

MAX_NESTING = 64
MAX_COUNT = 2000
LAST_CHARACTER = 0x10FFFF
_WORD = re.compile(r"[A-Za-z0-9_-]+")
_COUNT = re.compile(r"\{\s*([0-9]+)\s*(?:(,)\s*([0-9]*)\s*)?\}")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NUMBERED = {"x": 2, "u": 4, "U": 8}
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}


@frozen
class Text:
    """A text as it stands."""

    value: str


@frozen
class Characters:
    """One character of some ranges of code points, or with `is_negated` of none of them."""

    ranges: tuple[tuple[int, int], ...]
    is_negated: bool = False


@frozen
class RuleName:
    """What a rule matches."""

    name: str


@frozen
class InTurn:
    """Parts one after another; without any, nothing."""

    parts: tuple[Part, ...]


@frozen
class OneOf:
    """One of some parts."""

    parts: tuple[Part, ...]


@frozen
class Repeated:
    """A part so many times; `most` is None without a limit."""

    part: Part
    least: int
    most: int | None


Part = Text | Characters | RuleName | InTurn | OneOf | Repeated
ANY_CHARACTER = Characters((), is_negated=True)


def read_gbnf(text: str) -> dict[str, Part]:
    """Return the rules by name; `root` is among them, and every rule that is named.

    Raises: ValueError saying where, in line and column, something else was expected.
    """
    reader = _Reader(text)
    rules = reader.rules()
    if "root" not in rules:
        raise ValueError(f"there is no rule 'root'; there are {', '.join(list(rules)[:8])}")
    for name, part in rules.items():
        for used in names_in(part):
            if used not in rules:
                raise ValueError(f"rule {name!r} names {used!r}, which is no rule")
    return rules


def names_in(part: Part) -> Iterator[str]:
    """Yield the names of the rules that a part names."""
    todo = [part]
    while todo:
        one = todo.pop()
        if isinstance(one, RuleName):
            yield one.name
        elif isinstance(one, (InTurn, OneOf)):
            todo += one.parts
        elif isinstance(one, Repeated):
            todo.append(one.part)


def never_ending(rules: Mapping[str, Part]) -> set[str]:
    """Return the rules that no finite text matches."""
    used_by = rules_that_name(rules)
    ending: set[str] = set()
    todo = list(rules)
    while todo:
        name = todo.pop()
        if name not in ending and _ends(rules[name], ending):
            ending.add(name)
            todo += used_by.get(name, ())
    return set(rules) - ending


def rules_that_name(rules: Mapping[str, Part]) -> dict[str, list[str]]:
    """Return for each rule that is named those that name it, once each."""
    found: dict[str, list[str]] = {}
    for name, part in rules.items():
        for used in set(names_in(part)):
            found.setdefault(used, []).append(name)
    return found


def _ends(part: Part, ending: set[str]) -> bool:
    if isinstance(part, RuleName):
        return part.name in ending
    if isinstance(part, InTurn):
        return all(_ends(one, ending) for one in part.parts)
    if isinstance(part, OneOf):
        return any(_ends(one, ending) for one in part.parts)
    if isinstance(part, Repeated):
        return part.least == 0 or _ends(part.part, ending)
    return part == ANY_CHARACTER or isinstance(part, Text) or bool(part.ranges)


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def rules(self) -> dict[str, Part]:
        found: dict[str, Part] = {}
        self._skip(_LINES)
        while self._position < len(self._text):
            begin = self._position
            name = self._word("a rule's name")
            self._skip(_BLANK)
            self._demand("::=", f"'::=' behind {name!r}")
            self._skip(_LINES)
            if name in found:
                self._position = begin
                raise self._error(f"rule {name!r} is there already")
            found[name] = self._alternatives(0)
            if self._position < len(self._text) and self._peek() not in "\r\n":
                raise self._error("expected a part of the rule, or the end of its line")
            self._skip(_LINES)
        return found

    def _alternatives(self, depth: int) -> Part:
        if depth > MAX_NESTING:
            raise self._error(f"groups are nested deeper than allowed: {MAX_NESTING} levels")
        found = [self._sequence(depth)]
        while True:
            # Also at the beginning of a line, where llama.cpp does not look for it.
            ahead = _LINES.match(self._text, self._position)
            place = self._position if ahead is None else ahead.end()
            if self._text[place : place + 1] != "|":
                break
            self._position = place + 1
            self._skip(_LINES)
            found.append(self._sequence(depth))
        return found[0] if len(found) == 1 else OneOf(tuple(found))

    def _sequence(self, depth: int) -> Part:
        """Read parts up to the end of a line, or within a group over all lines."""
        blank = _LINES if depth else _BLANK
        found: list[Part] = []
        while True:
            self._skip(blank)
            part = self._part(depth)
            if part is None:
                return found[0] if len(found) == 1 else InTurn(tuple(found))
            self._skip(blank)
            found.append(self._repeated(part))

    def _part(self, depth: int) -> Part | None:
        character = self._peek()
        if character == '"':
            return self._quoted()
        if character == "[":
            return self._characters()
        if character == "(":
            self._position += 1
            self._skip(_LINES)
            part = self._alternatives(depth + 1)
            self._demand(")", "')'")
            return part
        if character == ".":
            self._position += 1
            return ANY_CHARACTER
        if character in ("<", "!"):
            raise self._error("tokens are not supported; write their texts")
        if character and _WORD.match(character):
            return RuleName(self._word("a name"))
        return None

    def _repeated(self, part: Part) -> Part:
        character = self._peek()
        counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if character in counts and character:
            self._position += 1
            least, most = counts[character]
            return Repeated(part, least, most)
        if character != "{":
            return part
        found = _COUNT.match(self._text, self._position)
        if found is None:
            raise self._error("expected a count such as {2}, {2,} or {2,5}")
        least = int(found[1])
        unlimited = found[2] is not None and not found[3]
        limit = None if unlimited else int(found[3] or found[1])
        if max(least, limit or 0) > MAX_COUNT or (limit is not None and limit < least):
            raise self._error(f"counts go up to {MAX_COUNT}, the second not below the first")
        self._position = found.end()
        return Repeated(part, least, limit)

    def _quoted(self) -> Part:
        self._position += 1
        found = []
        while self._peek() != '"':
            found.append(self._character("the '\"' that ends a text"))
        self._position += 1
        return Text("".join(found))

    def _characters(self) -> Part:
        self._position += 1
        is_negated = self._peek() == "^"
        self._position += is_negated
        ranges = []
        while self._peek() != "]":
            first = last = self._character("the ']' that ends the characters")
            if self._peek() == "-" and self._text[self._position + 1 : self._position + 2] != "]":
                self._position += 1
                last = self._character("the end of a range")
            if last < first:
                raise self._error(f"a range from {first!r} to {last!r} has no characters")
            ranges.append((ord(first), ord(last)))
        self._position += 1
        return Characters(tuple(ranges), is_negated)

    def _character(self, expected: str) -> str:
        """Read a character, escaped or not."""
        character = self._peek()
        if not character or character in "\r\n":
            raise self._error(f"expected {expected}")
        self._position += 1
        if character != "\\":
            return character
        kind = self._peek()
        size = _NUMBERED.get(kind)
        if size is None:
            if kind not in _ESCAPES:
                known = '\\n \\r \\t \\\\ \\" \\[ \\] \\x.. \\u.... \\U........'
                raise self._error(f"an escape that is not known; allowed: {known}")
            self._position += 1
            return _ESCAPES[kind]
        digits = self._text[self._position + 1 : self._position + 1 + size]
        if not re.fullmatch(rf"[0-9A-Fa-f]{{{size}}}", digits):
            raise self._error(f"expected {size} hexadecimal digits behind \\{kind}")
        number = int(digits, 16)
        if number > LAST_CHARACTER or 0xD800 <= number < 0xE000:
            raise self._error(f"\\{kind}{digits} is no character")
        self._position += 1 + size
        return chr(number)

    def _word(self, expected: str) -> str:
        found = _WORD.match(self._text, self._position)
        if found is None:
            raise self._error(f"expected {expected}")
        self._position = found.end()
        return found[0]

    def _demand(self, mark: str, expected: str) -> None:
        if not self._text.startswith(mark, self._position):
            raise self._error(f"expected {expected}")
        self._position += len(mark)

    def _peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def _skip(self, blank: re.Pattern[str]) -> None:
        found = blank.match(self._text, self._position)
        self._position = self._position if found is None else found.end()

    def _error(self, fact: str) -> ValueError:
        before = self._text[: self._position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        rest = self._text[self._position : self._position + 12]
        return ValueError(f"line {line}, column {column}: {fact}, found {rest or 'the end'!r}")
