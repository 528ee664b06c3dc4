"""Answers of routes that generate, as responses that notice when their client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from starlette.responses import Response

from quire.errors import QuireError
from quire.server.errors import ApiError, SequenceFailed, to_api_error
from quire.server.event_stream import EventSource, EventStream, Patience
from quire.server.generation import Generation
from quire.server.pooling_job import PoolingJob
from quire.server.records import record_of

# With twenty log-probabilities each, as many take 20 ms to write.
INLINE_TOKENS = 1024


Work = TypeVar("Work", Generation, PoolingJob)


class WholeReply(Response, Generic[Work]):
    """One body, sent when the generation, or the job for vectors, has ended."""

    def __init__(self, generation: Work, write: Callable[[Work], bytes]) -> None:
        super().__init__(media_type="application/json")
        self._generation: Work = generation
        self._write: Callable[[Work], bytes] = write
        self._client_is_gone = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Wait for the end or for the client to leave, whichever is first."""
        record = record_of(scope)
        record.generation = self._generation
        watcher = asyncio.create_task(self._watch(receive))
        try:
            finished = await self._finish()
            response: Response | None = None
            if finished:
                response = Response(await self._written(), media_type="application/json")
        except (QuireError, SequenceFailed) as error:
            record.error = to_api_error(error)
            response = error_response(record.error)
        finally:
            watcher.cancel()
            self._generation.close()
        record.client_left = self._client_is_gone
        if response is not None:
            await response(scope, receive, send)

    async def _written(self) -> bytes:
        """Return the body; one with many tokens is written in a thread, so that others go on."""
        usage = self._generation.usage
        if usage.prompt_tokens + usage.completion_tokens <= INLINE_TOKENS:
            return self._write(self._generation)
        return await asyncio.to_thread(self._write, self._generation)

    async def _finish(self) -> bool:
        while not self._generation.is_finished:
            await self._generation.wait()
            if self._client_is_gone:
                return False
        return True

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_is_gone = True
        self._generation.news.ring()


class EventReply(Response):
    """Server-sent events while the generation goes on."""

    def __init__(self, generation: Generation, source: EventSource, patience: Patience) -> None:
        super().__init__(media_type="text/event-stream")
        self._generation = generation
        self._stream = EventStream(source, patience)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send events; an error before the first one gets its own status."""
        record = record_of(scope)
        record.generation = self._generation
        self._stream.hang_up = scope["state"].get("quire_hang_up")
        try:
            await self._stream.run(receive, send)
        except ApiError as error:
            self._stream.error = error
            await error_response(error)(scope, receive, send)
        finally:
            record.error = self._stream.error
            record.client_left = self._stream.client_is_gone
            self._generation.close()


def error_response(error: ApiError) -> Response:
    """Return the answer that says an error."""
    return Response(
        error.body(),
        status_code=error.status,
        headers=dict(error.headers),
        media_type="application/json",
    )
