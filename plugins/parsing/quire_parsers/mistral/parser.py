"""Calls after `[TOOL_CALLS]`: Mistral's models, in the old form and in the new one."""

from __future__ import annotations

import secrets
import string

from quire.interfaces.answer_parsing import CallForm
from quire_parsers.call_reader import MAX_NAME_CHARS, Reading
from quire_parsers.object_call import ObjectCallReader

BEGIN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
LETTERS = string.ascii_letters + string.digits


class MistralParser(ObjectCallReader):
    """Reads `[TOOL_CALLS][{"name": "f", "arguments": {}}]` and `[TOOL_CALLS]f[ARGS]{}`.

    Calls get ids of nine letters and digits: Mistral's templates take no others.
    """

    needs_special_tokens = True
    call_form = CallForm(
        opening=BEGIN + "[",
        before_name='{"name": "',
        after_name='", "arguments": ',
        ends=("}", "}\n"),
        separator=", ",
        closing="]",
        trigger=BEGIN,
    )

    def _read(self) -> Reading:
        while (yield from self._say_until(BEGIN)):
            yield from self._try(self._calls())

    def _calls(self) -> Reading:
        yield from self._demand(BEGIN)
        yield from self._skip_blank()
        if (yield from self._starts_with("[")):
            yield from self._list()
        else:
            yield from self._named_call()

    def _list(self) -> Reading:
        while True:
            yield from self._skip_blank()
            yield from self._object_call()
            yield from self._skip_blank()
            if (yield from self._starts_with("]")):
                return
            yield from self._demand(",")

    def _named_call(self) -> Reading:
        name = yield from self._take_until("{[", MAX_NAME_CHARS)
        call_id = None
        if (yield from self._starts_with(ID)):
            call_id = yield from self._take_until("{[", MAX_NAME_CHARS)
        yield from self._starts_with(ARGUMENTS)
        yield from self._call_of(name.strip(), (call_id or "").strip() or None)

    def _begin_call(self, name: str, call_id: str | None = None) -> None:
        own = "".join(secrets.choice(LETTERS) for _ in range(9))
        super()._begin_call(name, call_id or own)
