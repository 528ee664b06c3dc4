"""Where the events of a streamed answer come from."""

from __future__ import annotations

import asyncio
from typing import Protocol

from quire.errors import QuireError
from quire.server.errors import ApiError, SequenceFailed, to_api_error
from quire.server.generation import Generation, Usage
from quire.text.output_processor import Delta

LARGE_BYTES = 65536  # takes about a millisecond to write


class EventWriter(Protocol):
    """What makes events of a generation; each method returns whole events, or b""."""

    def begin(self, generation: Generation) -> bytes: ...
    def pieces(self, index: int, delta: Delta) -> bytes: ...
    def with_usage(self, events: bytes, usage: Usage) -> bytes: ...
    def end(self, usage: Usage) -> bytes: ...
    def failure(self, error: ApiError) -> bytes: ...


class AnswerSource:
    """A generation, written as it comes."""

    def __init__(self, generation: Generation, answers: EventWriter) -> None:
        self.generation = generation
        self._answers = answers
        self._has_begun = False
        self._has_ended = False

    async def next(self) -> bytes:
        """Wait for the next events; b"" if the bell was rung for none.

        Raises: StopAsyncIteration at the end, ApiError where the generation failed.
        """
        if self._has_ended:
            raise StopAsyncIteration
        generation, answers = self.generation, self._answers
        try:
            news = await generation.wait()
        except (QuireError, SequenceFailed) as error:
            self._has_ended = True
            raise to_api_error(error) from error
        events = b""
        if not self._has_begun and news:
            self._has_begun = True
            events = answers.begin(generation)
        if len(news) == 1:
            events += answers.pieces(*news[0])
        else:
            events += await self._all_pieces(news)
        events = answers.with_usage(events, generation.usage)
        if generation.is_finished:
            self._has_ended = True
            events += answers.end(generation.usage)
        return events

    async def _all_pieces(self, news: list[tuple[int, Delta]]) -> bytes:
        """Return the events of all choices; others have a turn after large ones."""
        parts = []
        for index, delta in news:
            parts.append(self._answers.pieces(index, delta))
            if len(parts[-1]) > LARGE_BYTES:
                await asyncio.sleep(0)
        return b"".join(parts)

    def failure(self, error: ApiError) -> bytes:
        """Return the event that ends a stream which has begun."""
        return self._answers.failure(error)

    def ring(self) -> None:
        """Make a `next` that waits return."""
        self.generation.news.ring()
