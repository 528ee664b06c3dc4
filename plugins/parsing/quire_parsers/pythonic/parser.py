"""Calls as a Python list: Llama 3.2 and 4, ToolACE and others."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Generator
from typing import Any

from quire_parsers.call_reader import MAX_NAME_CHARS, CallReader, Reading
from quire_parsers.json_scanner import MAX_DEPTH, Malformed

BEGIN, END = "<|python_start|>", "<|python_end|>"
MAX_CALL_CHARS = 2**16
NO_NAME = "()[]{},;:='\" \t\r\n"
WORDS = {"true": True, "false": False, "null": None}

_PLAIN = re.compile(r"[^'\"()\[\]{}\\]+")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")


class PythonicParser(CallReader):
    """Reads `[f(x=1, y="a"), g()]` at the beginning of the answer; a call comes as a whole."""

    needs_special_tokens = True

    def _read(self) -> Reading:
        yield from self._hold_blank()
        yield from self._try(self._list())
        yield from self._say_all()

    def _list(self) -> Reading:
        yield from self._starts_with(BEGIN)
        yield from self._skip_blank()
        yield from self._demand("[")
        while True:
            yield from self._skip_blank()
            yield from self._call()
            yield from self._skip_blank()
            if (yield from self._starts_with("]")):
                break
            yield from self._demand(",")
        yield from self._skip_blank()
        yield from self._starts_with(END)

    def _call(self) -> Reading:
        name = yield from self._take_until(NO_NAME, MAX_NAME_CHARS)
        if not _NAME.fullmatch(name) or self._text[self._position] != "(":
            raise Malformed
        arguments = arguments_of((yield from self._parentheses()))
        self._begin_call(name)
        self._add_arguments(arguments)
        self._end_call()

    def _parentheses(self) -> Generator[None, None, str]:
        """Take text from a parenthesis to the one that closes it. Raises: Malformed."""
        nesting = _Nesting()
        taken: list[str] = []
        length = 0
        while not nesting.is_closed:
            yield from self._need_one()
            end = self._position
            while end < len(self._text) and not nesting.is_closed:
                end = nesting.after(self._text, end)
            taken.append(self._take(end))
            length += len(taken[-1])
            if length > MAX_CALL_CHARS:
                raise Malformed
        return "".join(taken)


class _Nesting:
    """Which brackets and quotes are open, over a text that comes in pieces."""

    def __init__(self) -> None:
        self.is_closed = False
        self._open = 0
        self._quote = ""
        self._is_escaped = False

    def after(self, text: str, position: int) -> int:
        """Look at what stands at a position; return the next. Raises: Malformed if too deep."""
        if self._is_escaped:
            self._is_escaped = False
            return position + 1
        plain = _PLAIN.match(text, position)
        if plain is not None:
            return plain.end()
        character = text[position]
        if character == "\\":
            self._is_escaped = True
        elif character in "'\"":
            if self._quote in ("", character):
                self._quote = "" if self._quote else character
        elif not self._quote:
            self._bracket(character)
        return position + 1

    def _bracket(self, character: str) -> None:
        self._open += 1 if character in "([{" else -1
        self.is_closed = self._open == 0
        if self._open > MAX_DEPTH:
            raise Malformed


def arguments_of(parentheses: str) -> str:
    """Return a call's keyword arguments, which are literals, as JSON. Raises: Malformed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            call = ast.parse("f" + parentheses, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise Malformed
        values = {word.arg: _literal(word.value) for word in call.keywords}
        if None in values or len(values) < len(call.keywords):
            raise Malformed
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        text.encode()  # half a surrogate pair is no text
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Malformed from error
    return text


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal that JSON can carry. Raises: Malformed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if type(value) in (int, float):
            return -value
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _literal(key) for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_literal, node.values), strict=True))
    raise Malformed
