"""Follow one JSON value through a text that comes in pieces."""

from __future__ import annotations

import re

MAX_DEPTH = 64

_STRING = re.compile(r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_BLANK = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_WHOLE_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII)


class Malformed(Exception):
    """The text is not what was expected."""


class JsonScanner:
    """Finds the end of a JSON value, and the first character that no JSON has there.

    Numbers and words are taken whole, escapes never cut: a piece that was taken can be shown.
    `position` is where it stands in the text that it was given last, also after an error.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.position = 0
        self._open: list[str] = []  # "{" or "[", the innermost last
        self._wants = "value"  # value, first (value or "]"), key, first key, colon, next
        self._is_key = False
        self._in_string = False

    def take(self, text: str, position: int, *, is_last: bool) -> None:
        """Go on at a position. Raises: Malformed.

        What is not taken is to be given again, with more behind it.
        """
        self.position = position
        while self.position < len(text) and not self.is_done:
            before = self.position
            if not self._in_string:
                self.position = _end_of(_BLANK, text, before)
            if self.position < len(text):
                step = self._string if self._in_string else self._token
                self.position = step(text, self.position, is_last)
            if self.position == before:
                break
        if is_last and not self.is_done:
            raise Malformed

    def _string(self, text: str, position: int, is_last: bool) -> int:
        self.position = end = _end_of(_STRING, text, position)
        if end == len(text) or _CUT_ESCAPE.match(text, end):
            return end
        if text[end] != '"':
            raise Malformed
        self._in_string = False
        if self._is_key:
            self._wants = "colon"
        else:
            self._end_value()
        return end + 1

    def _token(self, text: str, position: int, is_last: bool) -> int:
        character = text[position]
        if character in "{[":
            self._begin(character)
        elif character in "}]":
            self._end(character)
        elif character == '"':
            self._begin_string()
        elif character in ":,":
            self._separate(character)
        else:
            return self._scalar(text, position, is_last)
        return position + 1

    def _begin(self, character: str) -> None:
        if self._wants not in ("value", "first") or len(self._open) == MAX_DEPTH:
            raise Malformed
        self._open.append(character)
        self._wants = "first" if character == "[" else "first key"

    def _end(self, character: str) -> None:
        is_object = character == "}"
        empty = "first key" if is_object else "first"
        if not self._open or (self._open[-1] == "{") != is_object:
            raise Malformed
        if self._wants not in ("next", empty):
            raise Malformed
        self._open.pop()
        self._end_value()

    def _begin_string(self) -> None:
        if self._wants not in ("value", "first", "key", "first key"):
            raise Malformed
        self._is_key = self._wants.endswith("key")
        self._in_string = True

    def _separate(self, character: str) -> None:
        if character == ":" and self._wants == "colon":
            self._wants = "value"
        elif character == "," and self._wants == "next":
            self._wants = "key" if self._open[-1] == "{" else "value"
        else:
            raise Malformed

    def _scalar(self, text: str, position: int, is_last: bool) -> int:
        end = _end_of(_SCALAR, text, position)
        if end == position or self._wants not in ("value", "first") or end - position > 400:
            raise Malformed
        if end == len(text) and not is_last:
            return position
        if not _WHOLE_SCALAR.fullmatch(text, position, end):
            raise Malformed
        self._end_value()
        return end

    def _end_value(self) -> None:
        self._wants = "next"
        self.is_done = not self._open


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return position if found is None else found.end()
