"""Calls between DeepSeek's marks: V3 and R1, which fence the arguments, and V3.1."""

from __future__ import annotations

from quire.interfaces.answer_parsing import CallForm
from quire_parsers.call_reader import MAX_NAME_CHARS, CallReader, Reading
from quire_parsers.json_scanner import Malformed

MARK = "<｜tool▁call"  # how both of the first two begin
CALLS_BEGIN, CALL_BEGIN = MARK + "s▁begin｜>", MARK + "▁begin｜>"
CALLS_END, CALL_END = MARK + "s▁end｜>", MARK + "▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
KIND = "function"
FENCE = "```"


class DeepSeekParser(CallReader):
    """Reads a call's kind, name and fenced arguments, or its name and arguments alone."""

    needs_special_tokens = True
    call_form = CallForm(
        opening=CALLS_BEGIN,
        before_name=CALL_BEGIN + KIND + SEPARATOR,
        after_name=f"\n{FENCE}json\n",
        ends=(f"\n{FENCE}{CALL_END}",),
        separator="\n",
        closing=CALLS_END,
        trigger=CALLS_BEGIN,
        excludes=(CALL_BEGIN,),
    )

    def _read(self) -> Reading:
        while (yield from self._say_until(MARK)):
            yield from self._try(self._calls())

    def _calls(self) -> Reading:
        yield from self._demand(MARK)
        is_list = yield from self._starts_with(CALLS_BEGIN.removeprefix(MARK))
        if not is_list:
            yield from self._demand(CALL_BEGIN.removeprefix(MARK))
            yield from self._call()
            return
        while True:
            yield from self._skip_blank()
            if (yield from self._skip_mark(CALLS_END)):
                return
            yield from self._demand(CALL_BEGIN)
            yield from self._call()
            self._source.clear()

    def _call(self) -> Reading:
        name = yield from self._take_until("<", MAX_NAME_CHARS)
        yield from self._demand(SEPARATOR)
        yield from self._need_one()
        is_fenced = name.strip() == KIND and self._text[self._position] not in " \n{"
        if is_fenced:
            name = yield from self._take_until("\n", MAX_NAME_CHARS)
            yield from self._skip_blank()
            yield from self._demand(FENCE)
            if (yield from self._take_until("\n{", MAX_NAME_CHARS)).strip() not in ("", "json"):
                raise Malformed
        yield from self._call_of(name.strip())
        yield from self._skip_blank()
        if is_fenced:
            yield from self._skip_mark(FENCE)
            yield from self._skip_blank()
        yield from self._skip_mark(CALL_END)
