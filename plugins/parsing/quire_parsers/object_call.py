"""A call written as one JSON object: its name and its arguments, in any order."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Sequence

from quire_parsers.call_reader import CallReader, Reading, as_object
from quire_parsers.json_scanner import Malformed


class ObjectCallReader(CallReader):
    """Reads calls like `{"name": "f", "arguments": {"x": 1}}`.

    `argument_keys` are the keys that may hold the arguments. Where they may be left out, the call
    has none.
    """

    argument_keys: Sequence[str] = ("arguments", "parameters")
    needs_arguments = False

    def __init__(self, tool_names: Collection[str] | None = None) -> None:
        self._name: str | None = None
        self._held_arguments: str | None = None
        self._is_complete = False
        super().__init__(tool_names)

    def _object_call(self) -> Reading:
        """Read an object that is a call; what comes after its arguments is skipped if it can be.

        Raises: Malformed where it is no call, or its arguments end within.
        """
        self._name = self._held_arguments = None
        self._is_complete = False
        yield from self._demand("{")
        yield from self._skip_blank()
        if (yield from self._starts_with("}")):
            raise Malformed
        while True:
            yield from self._member()
            yield from self._skip_blank()
            if (yield from self._starts_with("}")):
                break
            yield from self._demand(",")
            yield from self._skip_blank()
        if not self._is_complete:
            self._call_without_arguments()

    def _member(self) -> Reading:
        yield from self._need_one()
        if self._text[self._position] != '"':
            raise Malformed
        key = json.loads((yield from self._value()))
        yield from self._skip_blank()
        yield from self._demand(":")
        yield from self._skip_blank()
        if key == "name":
            yield from self._name_member()
        elif key in self.argument_keys:
            yield from self._arguments_member()
        else:
            yield from self._value()

    def _name_member(self) -> Reading:
        name = json.loads((yield from self._value()))
        if self._name is not None or not isinstance(name, str) or not name:
            raise Malformed
        self._name = name
        if self._held_arguments is not None:
            self._begin_call(name)
            self._add_arguments(self._held_arguments)
            self._complete()

    def _arguments_member(self) -> Reading:
        if self._is_complete or self._held_arguments is not None:
            raise Malformed
        yield from self._need_one()
        is_object = self._text[self._position] == "{"
        if self._name is not None and is_object:
            self._begin_call(self._name)
            yield from self._value(shown=True)
            self._complete()
            return
        text: str | None = yield from self._value()
        if not is_object:
            text = as_object(text or "")
        if text is None:
            raise Malformed
        self._held_arguments = text
        if self._name is not None:
            self._begin_call(self._name)
            self._add_arguments(text)
            self._complete()

    def _call_without_arguments(self) -> None:
        if self._name is None or self.needs_arguments:
            raise Malformed
        self._begin_call(self._name)
        self._add_arguments("{}")
        self._complete()

    def _complete(self) -> None:
        self._is_complete = True
        self._end_call()

    def _try_object_call(self) -> Generator[None, None, bool]:
        """Read an object that may be a call; return whether it was read to its end."""
        return (yield from self._try(self._object_call()))
