"""Chat answers whose thoughts and calls are told apart from their content."""

from __future__ import annotations

from typing import Any

from quire.server.answer_parsing import (
    MeaningReader,
    Parsers,
    call_json,
    chat_delta,
    meaning_of,
)
from quire.server.answers import AnswerOptions, ChatAnswers, to_json
from quire.server.stream import Stream
from quire.text.output_processor import Delta


class MeaningAnswers(ChatAnswers):
    """As ChatAnswers, with `reasoning_content` and `tool_calls`."""

    def __init__(self, options: AnswerOptions, parsers: Parsers, prompt: str) -> None:
        super().__init__(options)
        self._parsers = parsers
        self._prompt = prompt
        self._readers: dict[int, MeaningReader] = {}

    def pieces(self, index: int, delta: Delta) -> bytes:
        """Return a chunk a piece of meaning, and one for the end."""
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = MeaningReader(self._parsers, self._prompt)
        is_last = delta.finish_reason is not None
        pieces = reader.push(delta.text, delta.token_ids, is_last=is_last)
        deltas = [found for piece in pieces if (found := chat_delta(piece)) is not None]
        tells_tokens = bool(delta.logprobs or (self.options.token_ids and delta.token_ids))
        if tells_tokens and not deltas:
            deltas.append({"content": ""})  # what the tokens mean is not certain yet
        events = b"".join(
            self._told(index, found, delta if number == 0 else None)
            for number, found in enumerate(deltas)
        )
        if is_last:
            reason = self._finish_reason(delta.finish_reason, reader.num_calls)
            events += self._chunk(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b,"stop_reason":%b}'
                % (index, to_json(reason), to_json(delta.stop_reason))
            )
        return events

    def choice(self, index: int, stream: Stream, number: int) -> dict[str, Any]:
        """Return a choice with its message."""
        choice = super().choice(index, stream, number)
        output = stream.output().outputs[number]
        meaning = meaning_of(self._parsers, self._prompt, output.text, output.token_ids)
        message: dict[str, Any] = {"role": "assistant", "content": meaning.content}
        message["refusal"] = None
        if meaning.reasoning:
            message["reasoning_content"] = meaning.reasoning
        if meaning.calls:
            message["content"] = meaning.content or None
            message["tool_calls"] = [call_json(call) for call in meaning.calls]
        reason = self._finish_reason(output.finish_reason, len(meaning.calls))
        return choice | {"message": message, "finish_reason": reason}

    def _finish_reason(self, reason: str | None, num_calls: int) -> str | None:
        """Return why a choice ended: to have functions called, or as the engine says."""
        is_told = num_calls and self._parsers.tells_of_calls
        return "tool_calls" if reason == "stop" and is_told else reason

    def _told(self, index: int, found: dict[str, Any], tokens: Delta | None) -> bytes:
        logprobs, extra = b"null", b""
        if tokens is not None:
            logprobs = to_json(self._logprobs(tokens)) if tokens.logprobs else b"null"
            extra = self._token_ids(tokens)
        return self._chunk(
            b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null%b}'
            % (index, to_json(found), logprobs, extra)
        )
