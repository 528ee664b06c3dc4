"""Thoughts between `<think>` marks."""

from __future__ import annotations

from collections.abc import Sequence

from quire.interfaces.answer_parsing import (
    Content,
    Reasoning,
    ReasoningParser,
    ThoughtsForm,
)

BEGIN, END = "<think>", "</think>"


class ThinkParser(ReasoningParser):
    """Takes an answer for thoughts where it, or the end of its prompt, opens them.

    White space at both ends of the thoughts, and at the beginning of what follows, is dropped.
    """

    begins_with_thoughts = False
    """What an answer begins with where no mark says so."""

    @classmethod
    def thoughts_form(cls, prompt: str) -> ThoughtsForm | None:
        """Return how thoughts begin an answer to a prompt; None after the mark that ends them."""
        place = _place_after(prompt)
        if place == "after":
            return None
        is_open = place == "inside" or cls.begins_with_thoughts
        return ThoughtsForm(begin="" if is_open else BEGIN, end=END, is_optional=not is_open)

    def __init__(self, prompt: str = "") -> None:
        self._place = _place_after(prompt)
        self._text = ""
        self._blank = ""  # white space in the thoughts that is dropped if they end
        self._is_first = True  # whether white space that comes next is dropped
        self._has_ended = False

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Reasoning | Content]:
        """Take more text; return what is certain by now."""
        self._text += text
        found: list[Reasoning | Content] = []
        if self._place == "before":
            self._begin()
        if self._place == "inside":
            found += self._thoughts()
        if self._place == "after":
            found += self._content()
        return found

    def finish(self) -> list[Reasoning | Content]:
        """End the answer; return the rest."""
        self._has_ended = True
        return self.push("")

    def _begin(self) -> None:
        text = self._text.lstrip()
        if text.startswith(BEGIN):
            self._text = text.removeprefix(BEGIN)
            self._place = "inside"
        elif self._has_ended or not BEGIN.startswith(text):
            self._place = "inside" if self.begins_with_thoughts else "after"
            self._is_first = self.begins_with_thoughts

    def _thoughts(self) -> list[Reasoning | Content]:
        text, mark, after = self._text.partition(END)
        self._text = after
        if mark:
            self._place = "after"
        elif not self._has_ended:
            text, self._text = _split_before(text, END)
        if self._is_first:
            text = text.lstrip()
        shown = (self._blank + text).rstrip()
        self._blank = (self._blank + text)[len(shown) :]
        self._is_first = bool(mark) or (self._is_first and not shown)
        return [Reasoning(shown)] if shown else []

    def _content(self) -> list[Reasoning | Content]:
        text, self._text = self._text, ""
        if self._is_first:
            text = text.lstrip()
        self._is_first = self._is_first and not text
        return [Content(text)] if text else []


class DeepSeekR1Parser(ThinkParser):
    """As ThinkParser, but an answer without the mark that opens begins with thoughts too."""

    begins_with_thoughts = True


def _place_after(prompt: str) -> str:
    """Return where an answer begins: before its thoughts, inside or after them."""
    tail = prompt[-1024:].rstrip()
    if tail.endswith(BEGIN):
        return "inside"
    return "after" if tail.endswith(END) else "before"


def _split_before(text: str, mark: str) -> tuple[str, str]:
    """Cut off an end that may be the beginning of a mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return text[:-length], text[-length:]
    return text, ""
