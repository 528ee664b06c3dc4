"""The answers of `POST /v1/responses`: one response object, or typed events that build it up."""

from __future__ import annotations

import itertools
import secrets
import time
from typing import Any

from quire.server.answer_logprobs import chat_logprobs
from quire.server.answers import AnswerOptions, to_json
from quire.server.errors import ApiError
from quire.server.generation import Generation, Usage
from quire.server.protocol.chat import given_fields
from quire.server.protocol.responses import ResponsesRequest
from quire.text.output_processor import Delta

COMPLETED, INCOMPLETE, RUNNING = "completed", "incomplete", "in_progress"


class ResponseAnswers:
    """Writes one response with one message; events are numbered from 0."""

    def __init__(self, options: AnswerOptions, asked: ResponsesRequest) -> None:
        self.options = options
        self.id = f"resp_{options.request_id or secrets.token_hex(24)}"
        self._item_id = f"msg_{secrets.token_hex(24)}"
        self._created = int(time.time())
        self._asked = asked
        self._numbers = itertools.count()
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason = "stop"

    def begin(self, generation: Generation) -> bytes:
        """Return the events that open the response, its message and the message's text."""
        response = self._response(RUNNING, [], None)
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._event(
                "response.output_item.added", output_index=0, item=self._item(RUNNING, None)
            )
            + self._event("response.content_part.added", **place, part=self._part("", []))
        )

    def pieces(self, index: int, delta: Delta) -> bytes:
        """Return an event with the new text, if there is some."""
        self._finish_reason = delta.finish_reason or self._finish_reason
        if not delta.text and not delta.logprobs:
            return b""
        logprobs = self._entries(delta.logprobs)
        self._texts.append(delta.text)
        self._logprobs += logprobs
        return self._text_event("response.output_text.delta", delta=delta.text, logprobs=logprobs)

    def end(self, usage: Usage) -> bytes:
        """Return the events that close what `begin` opened."""
        status = self._status()
        text, logprobs = "".join(self._texts), self._logprobs
        item = self._item(status, self._part(text, logprobs))
        return (
            self._text_event("response.output_text.done", text=text, logprobs=logprobs)
            + self._text_event("response.content_part.done", part=self._part(text, logprobs))
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event(f"response.{status}", response=self._response(status, [item], usage))
        )

    def failure(self, error: ApiError) -> bytes:
        """Return OpenAI's typed event, with the object that its client raises beside it."""
        fields = {"code": error.code, "message": error.message, "param": error.param}
        return self._event("error", **fields, **error.to_json())

    def with_usage(self, events: bytes, usage: Usage) -> bytes:
        """Return the events as they are: the last one alone tells the usage."""
        return events

    def whole(self, generation: Generation) -> bytes:
        """Return the response object of an answer that is not streamed."""
        output = generation.streams[0].output().outputs[0]
        self._finish_reason = output.finish_reason or self._finish_reason
        part = self._part(output.text, self._entries(output.logprobs))
        status = self._status()
        return to_json(self._response(status, [self._item(status, part)], generation.usage))

    def _status(self) -> str:
        return INCOMPLETE if self._finish_reason == "length" else COMPLETED

    def _entries(self, found: Any) -> list[dict[str, Any]]:
        if self.options.num_logprobs is None or not found:
            return []
        written = chat_logprobs(found, self.options.num_logprobs, self.options.token_bytes)
        content: list[dict[str, Any]] = written["content"]
        return content

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": next(self._numbers), **fields}
        return b"event: " + kind.encode() + b"\ndata: " + to_json(body) + b"\n\n"

    def _text_event(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _item(self, status: str, part: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if part is None else [part],
        }

    def _response(
        self, status: str, output: list[dict[str, Any]], usage: Usage | None
    ) -> dict[str, Any]:
        asked = self._asked
        reason = {"reason": "max_output_tokens"} if status == INCOMPLETE else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == COMPLETED else None,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.options.model,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_logprobs": asked.top_logprobs or 0,
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "text": self._text_options(),
            "truncation": "disabled",
            "background": False,
            "store": False,
            "metadata": asked.metadata or {},
            "usage": None if usage is None else _usage(usage),
        }

    def _text_options(self) -> dict[str, Any]:
        """Return the form that was asked for, as OpenAI repeats it."""
        given = None if self._asked.text is None else self._asked.text.format
        return {"format": {"type": "text"} if given is None else given_fields(given)}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
