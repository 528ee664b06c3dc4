"""Responses whose thoughts and calls are items of their own beside the message."""

from __future__ import annotations

import secrets
from typing import Any

from attrs import define, field

from quire.interfaces.answer_parsing import CallArguments, CallBroken, CallStart, Content, Reasoning
from quire.server.answer_parsing import MeaningPiece, MeaningReader, Parsers, meaning_of
from quire.server.answers import AnswerOptions, to_json
from quire.server.generation import Generation, Usage
from quire.server.protocol.responses import ResponsesRequest
from quire.server.response_answers import COMPLETED, INCOMPLETE, RUNNING, ResponseAnswers
from quire.text.output_processor import Delta

PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


@define
class Item:
    """One item of a response's output. `text` is a message's, thoughts' or arguments'."""

    kind: str
    text: str = ""
    logprobs: list[dict[str, Any]] = field(factory=list)
    name: str = ""
    call_id: str = ""
    id: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.id = f"{PREFIXES[self.kind]}_{secrets.token_hex(24)}"

    def part(self) -> dict[str, Any]:
        """Return the one part of a message's or thoughts' content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        part = {"type": "output_text", "text": self.text, "annotations": []}
        return part | {"logprobs": self.logprobs}

    def to_json(self, status: str) -> dict[str, Any]:
        """Return the item; its content comes when it is no longer in progress."""
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return item | {"call_id": self.call_id, "name": self.name, "arguments": self.text}
        item["content"] = [] if status == RUNNING else [self.part()]
        own: dict[str, Any] = {"role": "assistant"}
        if self.kind == "reasoning":
            own = {"summary": []}
        return item | own


class ItemAnswers(ResponseAnswers):
    """Writes a response as items, one open at a time."""

    def __init__(
        self, options: AnswerOptions, asked: ResponsesRequest, parsers: Parsers, prompt: str
    ) -> None:
        super().__init__(options, asked)
        self._parsers = parsers
        self._prompt = prompt
        self._reader = MeaningReader(parsers, prompt)
        self._open: Item | None = None
        self._done: list[dict[str, Any]] = []
        self._untold: list[dict[str, Any]] = []  # log-probabilities of text that is held back

    def begin(self, generation: Generation) -> bytes:
        """Return the events that open the response."""
        response = self._response(RUNNING, [], None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def pieces(self, index: int, delta: Delta) -> bytes:
        """Return the events of what the new text means."""
        self._finish_reason = delta.finish_reason or self._finish_reason
        self._untold += self._entries(delta.logprobs)
        is_last = delta.finish_reason is not None
        found = self._reader.push(delta.text, delta.token_ids, is_last=is_last)
        return b"".join(map(self._piece, found))

    def end(self, usage: Usage) -> bytes:
        """Return the events that close the response; it has at least a message."""
        events = b"" if self._open or self._done else self._begin_item(Item("message"))
        status = self._status()
        events += self._end_item(status)
        return events + self._event(
            f"response.{status}", response=self._response(status, self._done, usage)
        )

    def whole(self, generation: Generation) -> bytes:
        """Return the response object of an answer that is not streamed."""
        output = generation.streams[0].output().outputs[0]
        self._finish_reason = output.finish_reason or self._finish_reason
        meaning = meaning_of(self._parsers, self._prompt, output.text, output.token_ids)
        items = [Item("reasoning", meaning.reasoning)] if meaning.reasoning else []
        if meaning.content or not meaning.calls:
            items.append(Item("message", meaning.content, self._entries(output.logprobs)))
        items += [
            Item("function_call", call.arguments, name=call.name, call_id=call.id)
            for call in meaning.calls
        ]
        status = self._status()
        written = [item.to_json(COMPLETED) for item in items[:-1]] + [items[-1].to_json(status)]
        return to_json(self._response(status, written, generation.usage))

    def _piece(self, piece: MeaningPiece) -> bytes:
        if isinstance(piece, Content):
            return self._add("message", piece.text)
        if isinstance(piece, Reasoning):
            return self._add("reasoning", piece.text)
        if isinstance(piece, CallStart):
            item = Item("function_call", name=piece.name, call_id=piece.id or "")
            return self._end_item(COMPLETED) + self._begin_item(item)
        if isinstance(piece, CallArguments):
            return self._add("function_call", piece.text)
        assert isinstance(piece, CallBroken)
        return self._end_item(INCOMPLETE)

    def _add(self, kind: str, text: str) -> bytes:
        """Add text to the open item, or to a new one where the open one is of another kind."""
        events = b""
        if self._open is None or self._open.kind != kind:
            events = self._end_item(COMPLETED) + self._begin_item(Item(kind))
        assert self._open is not None
        self._open.text += text
        if kind == "function_call":
            return events + self._of_item("response.function_call_arguments.delta", delta=text)
        if kind == "reasoning":
            event = self._of_item("response.reasoning_text.delta", content_index=0, delta=text)
            return events + event
        logprobs, self._untold = self._untold, []
        self._open.logprobs += logprobs
        return events + self._of_item(
            "response.output_text.delta", content_index=0, delta=text, logprobs=logprobs
        )

    def _begin_item(self, item: Item) -> bytes:
        self._open = item
        index = len(self._done)
        added = {"output_index": index, "item": item.to_json(RUNNING)}
        events = self._event("response.output_item.added", **added)
        if item.kind == "function_call":
            return events
        return events + self._of_item(
            "response.content_part.added", content_index=0, part=item.part()
        )

    def _end_item(self, status: str) -> bytes:
        item = self._open
        if item is None:
            return b""
        if item.kind == "function_call":
            events = self._of_item(
                "response.function_call_arguments.done", name=item.name, arguments=item.text
            )
        else:
            events = self._text_done(item)
        written = item.to_json(status)
        events += self._event(
            "response.output_item.done", output_index=len(self._done), item=written
        )
        self._done.append(written)
        self._open = None
        return events

    def _text_done(self, item: Item) -> bytes:
        is_message = item.kind == "message"
        kind = "output_text" if is_message else "reasoning_text"
        own = {"logprobs": item.logprobs} if is_message else {}
        return self._of_item(
            f"response.{kind}.done", content_index=0, text=item.text, **own
        ) + self._of_item("response.content_part.done", content_index=0, part=item.part())

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        assert self._open is not None
        return self._event(kind, item_id=self._open.id, output_index=len(self._done), **fields)
