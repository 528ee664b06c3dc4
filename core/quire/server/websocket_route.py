"""Chat over a WebSocket: one JSON message asks, one message a chunk answers, closing cancels."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from quire.errors import QuireError
from quire.server.errors import ApiError, to_api_error
from quire.server.generation_routes import GenerationRoutes
from quire.server.protocol.chat import ChatCompletionRequest
from quire.server.protocol.parsing import parse
from quire.server.records import Record, Scope, finish_record
from quire.server.service import Service
from quire.server.sources import AnswerSource

OK = 200
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
        self._asks_too_much = False

    async def run(self) -> None:
        """Serve until either side closes."""
        reader = asyncio.create_task(self._read())
        self._service.on_drain.add(self._wake)
        try:
            while not self._is_gone:
                if self._service.is_draining and self._questions.empty():
                    await self._socket.close(TRY_AGAIN_LATER)
                    return
                question = await self._questions.get()
                if question is not None:
                    await self._answer(question)
            if self._asks_too_much:
                await self._socket.close(POLICY_VIOLATION, "too many questions at once")
        finally:
            self._service.on_drain.discard(self._wake)
            reader.cancel()

    def _wake(self) -> None:
        """Make `run` look whether there is still something to do."""
        self._questions.put_nowait(None)

    async def _read(self) -> None:
        """Take in questions, and notice that the client is gone."""
        while not self._asks_too_much:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                break
            self._asks_too_much = self._questions.qsize() >= MAX_WAITING_QUESTIONS
            text = message.get("text")
            self._questions.put_nowait(
                message.get("bytes", b"") if text is None else text.encode("utf-8", "replace")
            )
        self._is_gone = True
        self._wake()
        if self._source is not None:
            self._source.ring()

    async def _answer(self, question: bytes) -> None:
        """Answer a question, which has a record of its own."""
        record = Record(route="", arrival_s=time.monotonic())
        scope = self._socket.scope
        scope = {**scope, "state": {**scope["state"], "quire_record": record}}
        try:
            await self._send_answer(question, scope)
            record.status = OK
        except (QuireError, ApiError) as error:
            record.error = to_api_error(error)
            record.status = record.error.status
            await self._socket.send_text(record.error.body().decode())
        except WebSocketDisconnect:
            self._is_gone = True
        finally:
            record.client_left = self._is_gone
            finish_record(record, scope, self._service)

    async def _send_answer(self, question: bytes, scope: Scope) -> None:
        # What is asked here is always streamed, said or not.
        asked = msgspec.structs.replace(parse(question, ChatCompletionRequest), stream=True)
        generation, answers = await self._routes.begin_chat(scope, asked)
        self._source = AnswerSource(generation, answers)
        try:
            await self._send_all(self._source)
        finally:
            self._source = None
            generation.close()

    async def _send_all(self, source: AnswerSource) -> None:
        """Send each chunk as one message; `SlowReaders` ends one whose client reads nothing."""
        with contextlib.suppress(StopAsyncIteration):
            while True:
                events = await source.next()
                if self._is_gone:
                    return
                for part in events.split(b"\n\n")[:-1]:
                    await self._socket.send_text(part.removeprefix(PREFIX).decode())
