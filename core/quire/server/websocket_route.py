"""Chat over a WebSocket: one JSON message asks, one message a chunk answers, closing cancels."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from quire.errors import QuireError
from quire.server.errors import ApiError, to_api_error
from quire.server.generation_routes import GenerationRoutes
from quire.server.protocol.chat import ChatCompletionRequest
from quire.server.protocol.parsing import parse
from quire.server.records import record_of
from quire.server.service import Service
from quire.server.sources import AnswerSource

POLICY_VIOLATION = 1008
TRY_AGAIN_LATER = 1013
PREFIX = b"data: "
MAX_WAITING_QUESTIONS = 4


class WebSocketChat:
    """The route: an application that serves each connection."""

    def __init__(self, service: Service, routes: GenerationRoutes) -> None:
        self._service = service
        self._routes = routes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        socket = WebSocket(scope, receive, send)
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            await Connection(socket, self._service, self._routes).run()


class Connection:
    """One client. Its questions are answered one after another; `[DONE]` ends an answer."""

    def __init__(self, socket: WebSocket, service: Service, routes: GenerationRoutes) -> None:
        self._socket = socket
        self._service = service
        self._routes = routes
        self._questions: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._source: AnswerSource | None = None
        self._is_gone = False

    async def run(self) -> None:
        """Serve until either side closes."""
        reader = asyncio.create_task(self._read())
        self._service.on_drain.add(self._wake)
        try:
            while not self._is_gone:
                question = await self._questions.get()
                if question is not None:
                    await self._answer(question)
                if self._service.is_draining and not self._is_gone:
                    await self._socket.close(TRY_AGAIN_LATER)
                    return
        finally:
            self._service.on_drain.discard(self._wake)
            reader.cancel()

    def _wake(self) -> None:
        """Make `run` look whether there is still something to do."""
        self._questions.put_nowait(None)

    async def _read(self) -> None:
        """Take in questions, and notice that the client is gone."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                break
            if self._questions.qsize() >= MAX_WAITING_QUESTIONS:
                await self._socket.close(POLICY_VIOLATION, "too many questions at once")
                break
            text = message.get("text")
            self._questions.put_nowait(
                message.get("bytes", b"") if text is None else text.encode("utf-8", "replace")
            )
        self._is_gone = True
        self._wake()
        if self._source is not None:
            self._source.ring()

    async def _answer(self, question: bytes) -> None:
        record = record_of(self._socket.scope)
        try:
            # What is asked here is always streamed, said or not.
            asked = msgspec.structs.replace(parse(question, ChatCompletionRequest), stream=True)
            generation, answers = await self._routes.begin_chat(self._socket.scope, asked)
        except (QuireError, ApiError) as error:
            record.error = to_api_error(error)
            await self._socket.send_text(record.error.body().decode())
            return
        self._source = AnswerSource(generation, answers)
        try:
            await self._send_all(self._source)
        except ApiError as error:
            record.error = error
            await self._socket.send_text(error.body().decode())
        finally:
            self._source = None
            record.client_left = self._is_gone
            generation.close()

    async def _send_all(self, source: AnswerSource) -> None:
        """Send each chunk as one message; a client that reads nothing is given up."""
        limit_s = self._service.options.reader_timeout_s
        with contextlib.suppress(StopAsyncIteration):
            while True:
                events = await source.next()
                if self._is_gone:
                    return
                for part in events.split(b"\n\n")[:-1]:
                    text = part.removeprefix(PREFIX).decode()
                    await asyncio.wait_for(self._socket.send_text(text), limit_s)
