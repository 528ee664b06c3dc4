"""Server-sent events: one task a client, which waits for tokens and for the client, not more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from quire.server.answers import KEEP_ALIVE
from quire.server.errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventSource(Protocol):
    """Where events come from."""

    async def next(self) -> bytes:
        """Wait for the next events; b"" if there are none yet.

        Raises: StopAsyncIteration at the end, ApiError where it failed.
        """

    def failure(self, error: ApiError) -> bytes:
        """Return the event that ends a stream which has begun."""

    def ring(self) -> None:
        """Make a `next` that waits return."""


class Patience:
    """Looks after all open streams: comments where nothing comes, an end where nobody reads.

    One task for all: a timer for each write would cost more than the write.
    """

    def __init__(self, *, keep_alive_s: float, reader_timeout_s: float) -> None:
        self._keep_alive_s = keep_alive_s
        self._reader_timeout_s = reader_timeout_s
        self._open: set[EventStream] = set()

    def add(self, stream: EventStream) -> None:
        """Look after a stream."""
        self._open.add(stream)

    def remove(self, stream: EventStream) -> None:
        """Forget a stream."""
        self._open.discard(stream)

    async def run(self) -> None:
        """Look at every stream again and again."""
        period_s = min(1.0, self._keep_alive_s / 4, self._reader_timeout_s / 4)
        while True:
            await asyncio.sleep(period_s)
            now_s = time.monotonic()
            for stream in tuple(self._open):
                self._look_at(stream, now_s)

    def _look_at(self, stream: EventStream, now_s: float) -> None:
        if stream.writing_since_s is not None:
            if now_s - stream.writing_since_s > self._reader_timeout_s:
                stream.give_up()
        elif now_s - stream.written_s > self._keep_alive_s:
            stream.wants_comment = True
            stream.source.ring()


class EventStream:
    """One answer of events to one client."""

    def __init__(self, source: EventSource, patience: Patience) -> None:
        self.source = source
        self.written_s = time.monotonic()
        self.writing_since_s: float | None = None
        self.wants_comment = False
        self.client_is_gone = False
        self.error: ApiError | None = None  # that ended the stream
        self.hang_up: Callable[[], None] | None = None  # closes the connection at once
        self._patience = patience
        self._task: asyncio.Task[Any] | None = None

    async def run(self, receive: Receive, send: Send) -> None:
        """Send everything. Raises: ApiError while a status can still tell of it."""
        self._task = asyncio.current_task()
        watcher = asyncio.create_task(self._watch(receive))
        self._patience.add(self)
        try:
            await self._write_all(send)
        except asyncio.CancelledError:
            if not self.client_is_gone:
                raise
        finally:
            self._patience.remove(self)
            watcher.cancel()

    def give_up(self) -> None:
        """End a stream whose client takes nothing; what it did not take is thrown away."""
        self.client_is_gone = True
        if self.hang_up is not None:
            self.hang_up()
        if self._task is not None:
            self._task.cancel()

    async def _write_all(self, send: Send) -> None:
        """Begin with the first events, so that what fails before them has a status of its own."""
        has_begun = False
        while True:
            events, is_last = await self._next_events(raises=not has_begun)
            if self.client_is_gone:
                return
            if not has_begun and (events or is_last):
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                has_begun = True
            if events or is_last:
                await self._write(send, events, more=not is_last)
            if is_last:
                return

    async def _next_events(self, *, raises: bool) -> tuple[bytes, bool]:
        """Return the next events, and whether they are the last."""
        try:
            events = await self.source.next()
        except StopAsyncIteration:
            return b"", True
        except ApiError as error:
            if raises:
                raise
            self.error = error
            return self.source.failure(error), True
        if not events and self.wants_comment:
            events = KEEP_ALIVE
        return events, False

    async def _write(self, send: Send, events: bytes, *, more: bool) -> None:
        self.wants_comment = False
        self.writing_since_s = time.monotonic()
        await send({"type": "http.response.body", "body": events, "more_body": more})
        self.writing_since_s = None
        self.written_s = time.monotonic()

    async def _watch(self, receive: Receive) -> None:
        """Notice that the client is gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.client_is_gone = True
        self.source.ring()
