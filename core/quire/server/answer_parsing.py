"""What an answer's text means, choice by choice: thoughts, content, calls of functions."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from attrs import Factory, define, evolve, frozen

from quire.interfaces.answer_parsing import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Piece,
    Reasoning,
    ReasoningParser,
    ToolCallParser,
)
from quire.request import SamplingParams

log = logging.getLogger("quire.server")

MeaningPiece = Piece | Reasoning


@frozen(kw_only=True)
class Parsers:
    """What one request's answers are read with; None leaves that in the content."""

    reasoning: type[ReasoningParser] | None = None
    tool_call: type[ToolCallParser] | None = None
    tool_names: Sequence[str] = ()
    is_one_call: bool = False  # `parallel_tool_calls` is false
    tells_of_calls: bool = True  # by finish_reason; OpenAI does not for a function named ahead

    @property
    def needs_special_tokens(self) -> bool:
        """Whether special tokens have to be part of the text."""
        return any(kind.needs_special_tokens for kind in (self.reasoning, self.tool_call) if kind)

    def __bool__(self) -> bool:
        return self.reasoning is not None or self.tool_call is not None


def with_special_tokens(params: SamplingParams, parsers: Parsers) -> SamplingParams:
    """Return parameters that leave special tokens in the text where a parser reads them."""
    if not parsers.needs_special_tokens or not params.skip_special_tokens:
        return params
    return evolve(params, skip_special_tokens=False)


@define
class Call:
    """A call of a function."""

    name: str
    id: str
    arguments: str = ""


@define
class Meaning:
    """A whole answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = Factory(list)


class MeaningReader:
    """Reads one choice as it comes."""

    def __init__(self, parsers: Parsers, prompt: str) -> None:
        reasoning, tool_call = parsers.reasoning, parsers.tool_call
        self._thoughts = None if reasoning is None else reasoning(prompt)
        self._calls = None if tool_call is None else tool_call(parsers.tool_names)
        self._is_one_call = parsers.is_one_call
        self.num_calls = 0

    def push(self, text: str, token_ids: Sequence[int], *, is_last: bool) -> list[MeaningPiece]:
        """Take more text; return what is certain by now, calls with ids."""
        return [
            self._told(piece)
            for piece in self._read(text, token_ids, is_last)
            if not self._is_one_too_many(piece)
        ]

    def _read(self, text: str, token_ids: Sequence[int], is_last: bool) -> list[MeaningPiece]:
        thoughts = self._thoughts
        if thoughts is None:
            return self._read_content(text, token_ids, is_last)
        try:
            pieces = thoughts.push(text, token_ids) + (thoughts.finish() if is_last else [])
        except Exception:
            log.exception("the reasoning parser failed; the rest of the answer is content")
            self._thoughts = None
            return self._read_content(text, token_ids, is_last)
        found: list[MeaningPiece] = []
        for piece in pieces:
            if isinstance(piece, Reasoning):
                found.append(piece)
            else:
                found += self._read_content(piece.text, token_ids, False)
        return found + (self._read_content("", (), True) if is_last else [])

    def _read_content(
        self, text: str, token_ids: Sequence[int], is_last: bool
    ) -> list[MeaningPiece]:
        calls = self._calls
        try:
            if calls is not None:
                return [*calls.push(text, token_ids), *(calls.finish() if is_last else [])]
        except Exception:
            log.exception("the tool-call parser failed; the rest of the answer is content")
            self._calls = None
        return [Content(text)] if text else []

    def _is_one_too_many(self, piece: MeaningPiece) -> bool:
        is_call = isinstance(piece, CallStart | CallArguments | CallBroken)
        return self._is_one_call and is_call and piece.index > 0  # type: ignore[union-attr]

    def _told(self, piece: MeaningPiece) -> MeaningPiece:
        if not isinstance(piece, CallStart):
            return piece
        self.num_calls += 1
        return CallStart(piece.index, piece.name, piece.id or f"call_{secrets.token_hex(12)}")


def meaning_of(parsers: Parsers, prompt: str, text: str, token_ids: Sequence[int]) -> Meaning:
    """Read a whole answer: a call whose arguments are broken is content as the model wrote it."""
    reader = MeaningReader(parsers, prompt)
    return collected(reader.push(text, token_ids, is_last=True))


def collected(pieces: Iterable[MeaningPiece]) -> Meaning:
    """Put all pieces of an answer together."""
    meaning = Meaning()
    calls: dict[int, Call] = {}
    for piece in pieces:
        if isinstance(piece, Content):
            meaning.content += piece.text
        elif isinstance(piece, Reasoning):
            meaning.reasoning += piece.text
        elif isinstance(piece, CallStart):
            calls[piece.index] = Call(piece.name, piece.id or "")
        elif isinstance(piece, CallArguments):
            calls[piece.index].arguments += piece.text
        else:
            del calls[piece.index]
            meaning.content += piece.source
    meaning.calls = list(calls.values())
    return meaning


def call_json(call: Call) -> dict[str, Any]:
    """Return a call as an entry of a message's `tool_calls`."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def chat_delta(piece: MeaningPiece) -> dict[str, Any] | None:
    """Return a piece as the `delta` of a chat's chunk; None where it says nothing."""
    if isinstance(piece, Content):
        return {"content": piece.text}
    if isinstance(piece, Reasoning):
        return {"reasoning_content": piece.text}
    if isinstance(piece, CallStart):
        entry = call_json(Call(piece.name, piece.id or ""))
        return {"tool_calls": [{"index": piece.index, **entry}]}
    if isinstance(piece, CallArguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    return None
