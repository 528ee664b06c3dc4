"""Forced calls where no parser has a form for them: a JSON list, which a grammar has written."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from quire.interfaces.answer_parsing import (
    CallArguments,
    CallBroken,
    CallForm,
    CallStart,
    Content,
    Piece,
    ToolCallParser,
)

FORM = CallForm(
    opening="[",
    before_name='{"name": "',
    after_name='", "arguments": ',
    ends=("}", "}\n"),
    separator=", ",
    closing="]",
)
BLANK = " \t\r\n"


class JsonCallParser(ToolCallParser):
    """Reads `[{"name": "f", "arguments": {}}]`, spelled as the form is; the rest is content."""

    call_form = FORM

    def __init__(self, tool_names: Collection[str] | None = None) -> None:
        self._tool_names = tool_names
        self._text = ""
        self._source = ""  # of the call that is read
        self._num_calls = 0
        self._place = "head"  # head, arguments, end, content
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        """Take more text; return what is certain by now."""
        self._text += text
        found: list[Piece] = []
        while self._text:
            before = (len(self._text), self._place)
            found += getattr(self, f"_{self._place}")()
            if (len(self._text), self._place) == before:
                break
        return found

    def finish(self) -> list[Piece]:
        """End the answer; return the rest."""
        if self._place == "arguments":
            # The list before it is no text for a reader, where calls were read from it.
            is_first = self._num_calls == 1
            return [CallBroken(self._num_calls - 1, self._source if is_first else "")]
        is_cut = self._num_calls > 0 and self._place != "content"
        rest, self._text = self._text, ""
        return [Content(rest)] if rest and not is_cut else []

    def _head(self) -> list[Piece]:
        """Read what stands before a call's arguments, its name in it."""
        text = self._text.lstrip(BLANK)
        lead = (FORM.separator if self._num_calls else FORM.opening) + FORM.before_name
        name, mark, rest = text[len(lead) :].partition('"')
        if not text.startswith(lead[: len(text)]):
            return self._give_up()
        after = FORM.after_name.removeprefix('"')
        if len(text) <= len(lead) or not mark or len(rest) < len(after):
            return []
        is_known = self._tool_names is None or name in self._tool_names
        if not is_known or not rest.startswith(after):
            return self._give_up()
        self._source = text[: len(text) - len(rest) + len(after)]
        self._text = rest[len(after) :]
        self._place = "arguments"
        self._num_calls += 1
        return [CallStart(self._num_calls - 1, name)]

    def _arguments(self) -> list[Piece]:
        """Take text up to the brace that closes the arguments."""
        end = 0
        for end, character in enumerate(self._text, 1):  # noqa: B007
            self._step(character)
            if not self._depth:
                self._place = "end"
                break
        taken, self._text = self._text[:end], self._text[end:]
        self._source += taken
        return [CallArguments(self._num_calls - 1, taken)]

    def _step(self, character: str) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

    def _end(self) -> list[Piece]:
        """Read what closes a call, and the list where it ends."""
        rest = self._text.removeprefix("}").lstrip(BLANK)
        if not self._text.startswith("}"):
            return self._give_up()
        if rest:
            is_last = rest.startswith(FORM.closing)
            self._text = rest.removeprefix(FORM.closing)
            self._place = "content" if is_last else "head"
        return []

    def _give_up(self) -> list[Piece]:
        self._place = "content"
        return self._content()

    def _content(self) -> list[Piece]:
        text, self._text = self._text, ""
        if self._num_calls:
            text = text.lstrip(BLANK)
        return [Content(text)] if text else []
