"""Calls between `<tool_call>` marks: Hermes, Qwen 2.5 and 3, and the demo."""

from __future__ import annotations

from quire.interfaces.answer_parsing import CallForm
from quire_parsers.call_reader import Reading
from quire_parsers.object_call import ObjectCallReader

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(ObjectCallReader):
    """Reads `<tool_call>{"name": "f", "arguments": {}}</tool_call>`, any number of them."""

    call_form = CallForm(
        before_name=BEGIN + '\n{"name": "',
        after_name='", "arguments": ',
        ends=("}\n" + END,),
        separator="\n",
        trigger=BEGIN,
    )

    def _read(self) -> Reading:
        while (yield from self._say_until(BEGIN)):
            yield from self._try(self._call())
            if self._is_after_call:
                yield from self._skip_blank()
                yield from self._skip_mark(END)

    def _call(self) -> Reading:
        yield from self._demand(BEGIN)
        yield from self._skip_blank()
        yield from self._object_call()
