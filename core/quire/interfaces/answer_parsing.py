"""The contracts of tool-call and reasoning parsers: from an answer's text to what it means.

A parser is made for one answer. It is fed the text as it comes, cut anywhere, and what it gives
depends on the whole text alone, never on where it was cut. Nothing here imports torch.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence

from attrs import frozen


@frozen
class Content:
    """Text for the reader."""

    text: str


@frozen
class Reasoning:
    """Text of the model's thoughts."""

    text: str


@frozen
class CallStart:
    """A call begins. `index` counts the answer's calls from 0; an `id` of None is given later."""

    index: int
    name: str
    id: str | None = None


@frozen
class CallArguments:
    """More of the JSON text of a call's arguments; the pieces of a call make one JSON object."""

    index: int
    text: str


@frozen
class CallBroken:
    """The arguments of a call that began end in the middle, or are no JSON from here on.

    `source` is all of its text so far as the model wrote it. A whole answer shows that as content
    and leaves the call out; in a stream the call has begun, and what follows is content.
    """

    index: int
    source: str


Piece = Content | CallStart | CallArguments | CallBroken


@frozen(kw_only=True)
class CallForm:
    """How a parser's calls are written, so that a grammar can hold a model to it.

    Calls are `opening`; of each call `before_name`, the function's name, `after_name`, its
    arguments as one JSON object, and one of `ends`; `separator` between two calls; `closing`.
    White space that models like to join to a brace makes an end of its own. `trigger` begins the
    calls and never stands in other text. Without one, calls make a whole answer, which begins with
    one of `first_characters`; text then begins with another. `excludes` are marks that the parser
    takes for a call too, which text then must not have.
    """

    before_name: str
    after_name: str
    ends: tuple[str, ...]
    separator: str
    opening: str = ""
    closing: str = ""
    trigger: str | None = None
    first_characters: str = ""
    excludes: tuple[str, ...] = ()


@frozen(kw_only=True)
class ThoughtsForm:
    """How an answer's thoughts are written: `begin`, "" where they have begun, text, and `end`.

    `is_optional` says whether an answer may have none, and then not the marks.
    """

    begin: str
    end: str
    is_optional: bool


class ToolCallParser(abc.ABC):
    """Finds the calls of functions in one answer. Never raises for what a model writes.

    What is no call that can be read stays content, and so does a call of a function that the
    request did not offer. White space beside calls is dropped.
    """

    needs_special_tokens: bool = False
    """Whether the form has special tokens in it, which then are part of the text."""

    call_form: CallForm | None = None
    """How calls that are forced are written; None where they are no JSON between marks."""

    @abc.abstractmethod
    def __init__(self, tool_names: Collection[str] | None = None) -> None:
        """Begin an answer; `tool_names` are the functions on offer, None any."""

    @abc.abstractmethod
    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        """Take more text, and the tokens that made it; return what is certain by now."""

    @abc.abstractmethod
    def finish(self) -> list[Piece]:
        """End the answer; return the rest."""


class ReasoningParser(abc.ABC):
    """Tells an answer's thoughts from what is meant for the reader. Never raises."""

    needs_special_tokens: bool = False
    """Whether the marks are special tokens, which then are part of the text."""

    @classmethod
    def thoughts_form(cls, prompt: str) -> ThoughtsForm | None:
        """Return how thoughts begin an answer to a prompt; None where none come, or unknown."""
        return None

    @abc.abstractmethod
    def __init__(self, prompt: str = "") -> None:
        """Begin an answer to a prompt, which may end in the mark that opens the thoughts."""

    @abc.abstractmethod
    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Reasoning | Content]:
        """Take more text, and the tokens that made it; return what is certain by now."""

    @abc.abstractmethod
    def finish(self) -> list[Reasoning | Content]:
        """End the answer; return the rest."""
