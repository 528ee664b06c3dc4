"""Chat over a WebSocket, against a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
import websockets.sync.client
from serving import Server, serving

CHAT = [{"role": "user", "content": "A large latte, please."}]
CHAT_PATH = "/v1/chat/completions"
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def test_websocket_answers_one_message_a_chunk(server: Server) -> None:
    async def run() -> list[list[Any]]:
        url = server.url.replace("http", "ws") + "/v1/chat/completions"
        answers = []
        async with websockets.connect(url) as socket:
            for _ in range(2):
                await socket.send(json.dumps({**GREEDY, "messages": CHAT}))
                found: list[Any] = []
                while not found or found[-1] != "[DONE]":
                    text = await asyncio.wait_for(socket.recv(), 30)
                    found.append(text if text == "[DONE]" else json.loads(text))
                answers.append(found)
        return answers

    first, second = asyncio.run(run())

    texts = [
        "".join(c["choices"][0]["delta"].get("content", "") for c in answer[:-1])
        for answer in (first, second)
    ]
    assert texts[0] == texts[1] != ""


def test_websocket_streams_whether_asked_to_or_not(server: Server) -> None:
    body = {**GREEDY, "messages": CHAT, "stream_options": {"include_usage": True}}
    with websockets.sync.client.connect(server.url.replace("http", "ws") + CHAT_PATH) as socket:
        socket.send(json.dumps(body))
        found = [socket.recv(10)]
        while found[-1] != "[DONE]":
            found.append(socket.recv(10))

        socket.send(json.dumps({**GREEDY, "messages": CHAT, "prompt_logprobs": 1}))
        refused = json.loads(socket.recv(10))

    assert json.loads(found[-2])["usage"]["completion_tokens"] == 12
    assert refused["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize("path", ["/nope", "/v1/completions"])
def test_websocket_elsewhere_is_not_found(server: Server, path: str) -> None:
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        websockets.sync.client.connect(server.url.replace("http", "ws") + path)

    assert caught.value.response.status_code == 404
    assert json.loads(caught.value.response.body)["error"]["code"] == "not_found"


def test_websocket_answers_mistakes_and_goes_on(server: Server) -> None:
    body = {**GREEDY, "messages": CHAT}

    async def run() -> list[Any]:
        found = []
        async with websockets.connect(server.url.replace("http", "ws") + CHAT_PATH) as socket:
            for question in ("{not json", json.dumps({**body, "n": 0}), json.dumps(body)):
                await socket.send(question)
                found.append(json.loads(await socket.recv()))
        return found

    first, second, third = asyncio.run(run())

    assert first["error"]["type"] == "invalid_request_error"
    assert second["error"]["param"] == "n"
    assert third["object"] == "chat.completion.chunk"


def test_closing_a_websocket_frees_everything(server: Server) -> None:
    body = {"model": "demo", "messages": CHAT, "n": 4, "max_tokens": 1500, "ignore_eos": True}

    async def run() -> None:
        async with websockets.connect(server.url.replace("http", "ws") + CHAT_PATH) as socket:
            await socket.send(json.dumps(body))
            await socket.recv()

    asyncio.run(run())

    server.wait_until_idle(timeout_s=1.0)


def test_every_question_on_a_websocket_is_counted(server: Server) -> None:
    names = ("vllm:generation_tokens_total", "vllm:request_success_total")
    before = [server.figure(name) for name in names]

    async def run() -> None:
        async with websockets.connect(server.url.replace("http", "ws") + CHAT_PATH) as socket:
            for _ in range(3):
                await socket.send(json.dumps({**GREEDY, "messages": CHAT, "ignore_eos": True}))
                while await socket.recv() != "[DONE]":
                    pass

    asyncio.run(run())

    found = [server.figure(name) - was for name, was in zip(names, before, strict=True)]
    assert found == [36, 3]


async def read_all(socket: Any) -> None:
    while True:
        await socket.recv()


def test_websocket_that_asks_too_much_is_closed(server: Server) -> None:
    body = {"model": "demo", "messages": CHAT, "max_tokens": 1500, "ignore_eos": True}

    async def run() -> int:
        async with websockets.connect(server.url.replace("http", "ws") + CHAT_PATH) as socket:
            for _ in range(8):
                await socket.send(json.dumps(body))
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await asyncio.wait_for(read_all(socket), 20)
            return closed.value.rcvd.code if closed.value.rcvd else 0

    assert asyncio.run(run()) == 1008
    server.wait_until_idle(timeout_s=1.0)
    assert "Traceback" not in server.read_log()
