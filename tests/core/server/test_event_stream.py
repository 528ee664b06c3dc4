"""One client's events: comments while nothing comes, an end where nobody reads or all is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from quire.server.errors import ApiError
from quire.server.event_stream import EventStream, Patience


class Source:
    """Gives what a test puts in; an exception is raised."""

    def __init__(self, *given: bytes | Exception) -> None:
        self.waiting: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        for one in given:
            self.waiting.put_nowait(one)

    async def next(self) -> bytes:
        found = await self.waiting.get()
        if isinstance(found, Exception):
            raise found
        return found

    def failure(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n"

    def ring(self) -> None:
        self.waiting.put_nowait(b"")


class Client:
    """Takes messages; `leave` makes it go away, `stuck` makes it read nothing."""

    def __init__(self, *, stuck: bool = False) -> None:
        self.sent: list[Any] = []
        self.leave = asyncio.Event()
        self._stuck = stuck

    async def receive(self) -> dict[str, Any]:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if self._stuck and message["type"] == "http.response.body":
            await asyncio.Event().wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def patience(keep_alive_s: float = 60.0, reader_timeout_s: float = 60.0) -> Patience:
    return Patience(keep_alive_s=keep_alive_s, reader_timeout_s=reader_timeout_s)


def run(stream: EventStream, client: Client, *others: Any) -> None:
    async def all_of_it() -> None:
        tasks = [asyncio.create_task(other) for other in others]
        async with asyncio.timeout(5):
            await stream.run(client.receive, client.send)
        for task in tasks:
            task.cancel()

    asyncio.run(all_of_it())


def test_events_go_out_as_they_come() -> None:
    client = Client()
    stream = EventStream(
        Source(b"data: 1\n\n", b"", b"data: 2\n\n", StopAsyncIteration()), patience()
    )

    run(stream, client)

    assert client.body == b"data: 1\n\ndata: 2\n\n"
    assert client.sent[0]["status"] == 200
    assert client.sent[-1]["more_body"] is False


def test_error_before_the_first_event_has_a_status_of_its_own() -> None:
    client = Client()

    with pytest.raises(ApiError):
        run(EventStream(Source(b"", ApiError(503, "full")), patience()), client)

    assert client.sent == []


def test_error_after_events_is_the_last_event() -> None:
    client = Client()
    stream = EventStream(Source(b"data: 1\n\n", ApiError(500, "it died")), patience())

    run(stream, client)

    assert b'"it died"' in client.body.split(b"\n\n")[1]
    assert b"[DONE]" not in client.body
    assert stream.error is not None


def test_client_that_leaves_ends_it() -> None:
    client = Client()
    stream = EventStream(Source(b"data: 1\n\n"), patience())

    async def leave() -> None:
        await asyncio.sleep(0.01)
        client.leave.set()

    run(stream, client, leave())

    assert stream.client_is_gone
    assert stream.error is None


def test_pauses_are_filled_with_comments() -> None:
    client, looks_after = Client(), patience(keep_alive_s=0.05)
    source = Source(b"data: 1\n\n")
    stream = EventStream(source, looks_after)

    async def end() -> None:
        await asyncio.sleep(0.3)
        source.waiting.put_nowait(StopAsyncIteration())

    run(stream, client, looks_after.run(), end())

    assert client.body.startswith(b"data: 1\n\n: keep-alive\n\n")
    assert 2 <= client.body.count(b": keep-alive") <= 6


def test_reader_that_takes_nothing_is_cut_off() -> None:
    client, looks_after = Client(stuck=True), patience(reader_timeout_s=0.05)
    stream = EventStream(Source(b"data: 1\n\n"), looks_after)
    hung_up = []
    stream.hang_up = lambda: hung_up.append(True)

    run(stream, client, looks_after.run())

    assert stream.client_is_gone
    assert hung_up == [True]
