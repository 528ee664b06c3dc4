"""The bodies of answers: JSON as OpenAI's clients read it, whole or in server-sent events."""

from __future__ import annotations

import abc
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from attrs import frozen

from quire.server.answer_logprobs import (
    CompletionLogprobs,
    TokenBytes,
    chat_logprobs,
    prompt_logprobs,
)
from quire.server.errors import ApiError
from quire.server.generation import Generation, Usage
from quire.server.stream import Stream
from quire.text.output_processor import Delta

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

to_json: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def event(value: Any) -> bytes:
    """Return a server-sent event without a name."""
    return b"data: " + to_json(value) + b"\n\n"


@frozen(kw_only=True)
class AnswerOptions:
    """What a request says about the form of its answer.

    `num_logprobs` is None where none are wanted, as `num_prompt_logprobs` is. `token_bytes` spells
    a token.
    """

    model: str
    token_bytes: TokenBytes
    fingerprint: str
    include_usage: bool = False
    continuous_usage: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    echo: bool = False
    generates: bool = True  # False: the prompt alone is echoed
    token_ids: bool = False
    request_id: str | None = None  # what the answer is called; None: a name of its own


class Answers(abc.ABC):
    """Writes one request's answer. A choice's pieces must be given in order."""

    prefix: str
    whole_kind: str
    chunk_kind: str

    def __init__(self, options: AnswerOptions) -> None:
        self.options = options
        self.id = f"{self.prefix}-{options.request_id or secrets.token_hex(12)}"
        self.created = int(time.time())
        head = {"id": self.id, "object": self.chunk_kind, "created": self.created}
        head |= {"model": options.model, "system_fingerprint": options.fingerprint}
        # A chunk differs from the next one in its choice alone.
        self._head = b"data: " + to_json(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"

    @abc.abstractmethod
    def begin(self, generation: Generation) -> bytes:
        """Return the events before the first token."""

    @abc.abstractmethod
    def pieces(self, index: int, delta: Delta) -> bytes:
        """Return the events for what is new in a choice."""

    @abc.abstractmethod
    def choice(self, index: int, stream: Stream, number: int) -> dict[str, Any]:
        """Return choice `index` of a whole answer: sequence `number` of its stream."""

    def end(self, usage: Usage) -> bytes:
        """Return the events after the last token."""
        if not self.options.include_usage:
            return DONE
        usage_json = to_json(usage.to_json())
        return self._head + b'],"usage":' + usage_json + b"}\n\n" + DONE

    def failure(self, error: ApiError) -> bytes:
        """Return the event of an error, which no `[DONE]` follows."""
        return b"data: " + error.body() + b"\n\n"

    def whole(self, generation: Generation) -> bytes:
        """Return the body of an answer that is not streamed."""
        return to_json(self._whole(generation))

    def _whole(self, generation: Generation) -> dict[str, Any]:
        choices = [
            self.choice(number * generation.n + sequence, stream, sequence)
            for number, stream in enumerate(generation.streams)
            for sequence in range(generation.n)
        ]
        return {
            "id": self.id,
            "object": self.whole_kind,
            "created": self.created,
            "model": self.options.model,
            "system_fingerprint": self.options.fingerprint,
            "choices": choices,
            "usage": generation.usage.to_json(),
        }

    def with_usage(self, events: bytes, usage: Usage) -> bytes:
        """Return the events with the usage so far, for `continuous_usage_stats`."""
        if not self.options.continuous_usage:
            return events
        tail = b'],"usage":' + to_json(usage.to_json()) + b"}\n\n"
        return events.replace(self._tail, tail)

    def _of_prompt(self, stream: Stream) -> dict[str, Any]:
        """Return what a whole chat answer, or a completion's choice, says of its prompt."""
        if self.options.num_prompt_logprobs is None:
            return {}
        found = prompt_logprobs(stream.prompt_logprobs, self.options.num_prompt_logprobs)
        return {"prompt_logprobs": found}

    def _has_news(self, delta: Delta) -> bool:
        """Whether a chunk is to be sent: tokens without a text are told of where ids are wanted."""
        return bool(delta.text or delta.logprobs or (self.options.token_ids and delta.token_ids))

    def _chunk(self, choice: bytes) -> bytes:
        return self._head + choice + self._tail


class ChatAnswers(Answers):
    """`chat.completion` and its chunks: the role once, the finish in a chunk of its own."""

    prefix = "chatcmpl"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def begin(self, generation: Generation) -> bytes:
        """Return a chunk with the role for each choice, in the order of their indices."""
        return b"".join(
            self._chunk(
                b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
                b'"finish_reason":null}' % index
            )
            for index in range(len(generation.streams) * generation.n)
        )

    def pieces(self, index: int, delta: Delta) -> bytes:
        """Return a chunk with text, where there is some, and one for the end."""
        events = b""
        if self._has_news(delta):
            logprobs = to_json(self._logprobs(delta)) if delta.logprobs else b"null"
            extra = self._token_ids(delta)
            events = self._chunk(
                b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null%b}'
                % (index, to_json(delta.text), logprobs, extra)
            )
        if delta.finish_reason is not None:
            events += self._chunk(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b,"stop_reason":%b}'
                % (index, to_json(delta.finish_reason), to_json(delta.stop_reason))
            )
        return events

    def choice(self, index: int, stream: Stream, number: int) -> dict[str, Any]:
        """Return a choice with its message."""
        output = stream.output().outputs[number]
        logprobs = None
        if self.options.num_logprobs is not None and output.logprobs is not None:
            logprobs = chat_logprobs(
                output.logprobs, self.options.num_logprobs, self.options.token_bytes
            )
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        return choice | ({"token_ids": output.token_ids} if self.options.token_ids else {})

    def whole(self, generation: Generation) -> bytes:
        """Return the body; a conversation's prompt is told of beside its choices."""
        return to_json(self._whole(generation) | self._of_prompt(generation.streams[0]))

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        return chat_logprobs(
            delta.logprobs or (), self.options.num_logprobs or 0, self.options.token_bytes
        )

    def _token_ids(self, delta: Delta) -> bytes:
        return b',"token_ids":' + to_json(delta.token_ids) if self.options.token_ids else b""


class CompletionAnswers(Answers):
    """`text_completion`, whose chunks have the same kind; may echo the prompt."""

    prefix = "cmpl"
    whole_kind = chunk_kind = "text_completion"

    def __init__(self, options: AnswerOptions, prompt_text: Callable[[Stream], str]) -> None:
        super().__init__(options)
        self._prompt_text = prompt_text
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._to_echo: dict[int, Stream] = {}

    def begin(self, generation: Generation) -> bytes:
        """Return an empty chunk a choice where there are several, so that they come in order.

        Prompts to echo go out before each choice's first token.
        """
        numbers = range(len(generation.streams) * generation.n)
        if self.options.echo:
            self._to_echo = {i: generation.streams[i // generation.n] for i in numbers}
        if len(numbers) == 1:
            return b""
        return b"".join(self._piece(index, "", b"null") for index in numbers)

    def pieces(self, index: int, delta: Delta) -> bytes:
        """Return a chunk with text, where there is some, and one for the end."""
        events = b""
        stream = self._to_echo.pop(index, None)
        if stream is not None:
            logprobs = self._prompt_logprobs(index, stream)
            events += self._piece(index, self._prompt_text(stream), to_json(logprobs))
        if self.options.generates and self._has_news(delta):
            found = self._added(index, delta.token_ids, delta.logprobs)
            events += self._piece(index, delta.text, to_json(found), self._token_ids(delta))
        if delta.finish_reason is not None:
            reason = delta.finish_reason if self.options.generates else "length"
            events += self._chunk(
                b'{"index":%d,"text":"","logprobs":null,"finish_reason":%b,"stop_reason":%b}'
                % (index, to_json(reason), to_json(delta.stop_reason))
            )
        return events

    def choice(self, index: int, stream: Stream, number: int) -> dict[str, Any]:
        """Return a choice with its text."""
        output = stream.output().outputs[number]
        text, logprobs, reason = "", None, "length"
        if self.options.echo:
            text = self._prompt_text(stream)
            logprobs = self._prompt_logprobs(index, stream)
        if self.options.generates:
            text += output.text
            reason = output.finish_reason or reason
            logprobs = _joined(logprobs, self._added(index, output.token_ids, output.logprobs))
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": output.stop_reason if self.options.generates else None,
        }
        if self.options.token_ids:
            choice["token_ids"] = output.token_ids if self.options.generates else []
            choice["prompt_token_ids"] = list(stream.request.prompt_token_ids)
        return choice | self._of_prompt(stream)

    def _piece(self, index: int, text: str, logprobs: bytes, extra: bytes = b"") -> bytes:
        return self._chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null%b}'
            % (index, to_json(text), logprobs, extra)
        )

    def _token_ids(self, delta: Delta) -> bytes:
        return b',"token_ids":' + to_json(delta.token_ids) if self.options.token_ids else b""

    def _prompt_logprobs(self, index: int, stream: Stream) -> dict[str, Any] | None:
        return self._added(index, stream.request.prompt_token_ids, stream.prompt_logprobs)

    def _added(self, index: int, token_ids: Sequence[int], entries: Any) -> dict[str, Any] | None:
        num_logprobs = self.options.num_logprobs
        if num_logprobs is None or entries is None:
            return None
        writer = self._logprobs.get(index)
        if writer is None:
            writer = CompletionLogprobs(num_logprobs, self.options.token_bytes)
            self._logprobs[index] = writer
        return writer.add(token_ids, entries)


def _joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    if first is None or second is None:
        return first or second
    return {name: [*values, *second[name]] for name, values in first.items()}
