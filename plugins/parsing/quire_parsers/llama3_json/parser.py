"""Calls as bare JSON objects: Llama 3.1 to 3.3."""

from __future__ import annotations

from quire.interfaces.answer_parsing import CallForm
from quire_parsers.call_reader import Reading
from quire_parsers.object_call import ObjectCallReader

TAG = "<|python_tag|>"


class Llama3JsonParser(ObjectCallReader):
    """Reads `{"name": "f", "parameters": {}}` at the beginning of the answer or after a tag.

    Several of them stand behind one another or between semicolons. An object without parameters
    is no call: it may be the answer.
    """

    needs_special_tokens = True
    argument_keys = ("parameters", "arguments")
    needs_arguments = True
    call_form = CallForm(
        before_name='{"name": "',
        after_name='", "parameters": ',
        ends=("}", "}\n"),
        separator="; ",
        first_characters="{" + TAG[0],
        excludes=(TAG,),
    )

    def _read(self) -> Reading:
        yield from self._hold_blank()
        yield from self._calls()
        while (yield from self._say_until(TAG)):
            yield from self._calls()

    def _calls(self) -> Reading:
        while (yield from self._try(self._call())):
            pass

    def _call(self) -> Reading:
        yield from self._starts_with(TAG)
        yield from self._skip_blank()
        yield from self._object_call()
        yield from self._skip_blank()
        yield from self._starts_with(";")
        yield from self._skip_blank()
