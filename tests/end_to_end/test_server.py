"""`quire serve demo` as a process, asked by the official client and by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import websockets
from serving import Server, events_of, serving

from quire import LLM, SamplingParams

CHAT = [{"role": "user", "content": "A large latte, please."}]
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def offline() -> LLM:
    return LLM("demo", num_threads=1)


def stream(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    answer = httpx.post(server.url + path, json={**body, "stream": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    return events_of(answer.text)


def test_completion_equals_offline(client: openai.OpenAI, offline: LLM) -> None:
    answer = client.completions.create(prompt=["I want", "Hello there"], **GREEDY)

    params = SamplingParams(temperature=0, max_tokens=12)
    expected = offline.generate(["I want", "Hello there"], params, use_tqdm=False)
    assert [c.text for c in answer.choices] == [o.outputs[0].text for o in expected]
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(o.prompt_token_ids) for o in expected)
    assert answer.usage.completion_tokens == sum(len(o.outputs[0].token_ids) for o in expected)


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8, 9]]])
def test_completion_takes_token_ids(client: openai.OpenAI, prompt: Any) -> None:
    answer = client.completions.create(prompt=prompt, **GREEDY)

    assert len(answer.choices) == (1 if prompt == [5, 6, 7] else 2)


def test_echo_puts_the_prompt_first(client: openai.OpenAI) -> None:
    plain = client.completions.create(prompt="I want", **GREEDY)

    echoed = client.completions.create(prompt="I want", echo=True, **GREEDY)

    assert echoed.choices[0].text == "I want" + plain.choices[0].text


def test_echo_without_tokens_gives_the_prompt_alone(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="I want", echo=True, **{**GREEDY, "max_tokens": 0})

    assert answer.choices[0].text == "I want"


def test_chat_equals_offline(client: openai.OpenAI, offline: LLM) -> None:
    answer = client.chat.completions.create(messages=CHAT, **GREEDY)  # type: ignore[call-overload]

    params = SamplingParams(temperature=0, max_tokens=12)
    expected = offline.chat(CHAT, params, use_tqdm=False)[0]
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    options = {**GREEDY, "messages": CHAT, "max_tokens": 400}
    whole = client.chat.completions.create(**options)

    with client.chat.completions.stream(**options) as events:
        final = events.get_final_completion()

    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.choices[0].message.role == "assistant"


def test_async_client_streams_many_at_once(server: Server) -> None:
    async def run() -> list[str]:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none")

        async def one() -> str:
            chunks = await client.completions.create(prompt="I want", stream=True, **GREEDY)
            return "".join([c.choices[0].text async for c in chunks])

        return await asyncio.gather(*[one() for _ in range(8)])

    texts = asyncio.run(run())

    assert len(set(texts)) == 1


def test_raw_answer_carries_the_request_id(client: openai.OpenAI) -> None:
    raw = client.with_raw_response.models.list(extra_headers={"X-Request-Id": "mine-1"})

    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().data[0].id == "demo"


def test_stream_has_role_once_and_usage_last(server: Server) -> None:
    body = {**GREEDY, "messages": CHAT, "n": 2, "stream_options": {"include_usage": True}}

    *chunks, usage, done = stream(server, "/v1/chat/completions", body)

    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 24
    assert all(chunk["usage"] is None for chunk in chunks)
    roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert roles == [0, 1]
    ends = [c["choices"][0] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(end["index"] for end in ends) == [0, 1]
    assert all(end["delta"] == {} for end in ends)
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("stop", [" I", "please", "."])
def test_stop_string_never_shows_in_a_stream(server: Server, stop: str) -> None:
    body = {**GREEDY, "prompt": "Hello", "max_tokens": 60, "ignore_eos": True}
    whole = httpx.post(server.url + "/v1/completions", json=body).json()["choices"][0]["text"]

    chunks = stream(server, "/v1/completions", {**body, "stop": [stop]})[:-1]

    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == whole.split(stop)[0]
    reason = chunks[-1]["choices"][0]["finish_reason"]
    assert reason == ("stop" if stop in whole else "length")


def test_tools_reach_the_template(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "add_drink", "parameters": {}}}]
    url = server.url + "/tokenize"

    plain = httpx.post(url, json={"messages": CHAT}).json()["count"]
    with_tools = httpx.post(url, json={"messages": CHAT, "tools": tools}).json()["count"]

    assert with_tools > plain


def test_tokens_go_there_and_back(server: Server) -> None:
    text = "Two flat whites, olé! \N{HOT BEVERAGE}"

    tokens = httpx.post(server.url + "/tokenize", json={"prompt": text}).json()["tokens"]
    back = httpx.post(server.url + "/detokenize", json={"tokens": tokens}).json()

    assert back == {"prompt": text}


def test_seeded_answers_are_equal(client: openai.OpenAI) -> None:
    options = {**GREEDY, "temperature": 1.5, "seed": 7}

    texts = {client.completions.create(prompt="Hi", **options).choices[0].text for _ in range(3)}

    assert len(texts) == 1


def test_plain_routes_answer(server: Server) -> None:
    assert json.loads(server.get("/health")) == {"status": "ok"}
    assert set(json.loads(server.get("/version"))) == {"version"}
    assert json.loads(server.get("/v1/models/demo"))["max_model_len"] == 2048
    assert json.loads(server.get("/openapi.json"))["openapi"] == "3.1.0"


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


def test_figures_count_requests_and_tokens(server: Server, client: openai.OpenAI) -> None:
    before = server.figure("vllm:generation_tokens_total")

    client.completions.create(prompt="I want", **GREEDY, extra_body={"ignore_eos": True})

    server.wait_until_idle()
    assert server.figure("vllm:generation_tokens_total") == before + 12
    assert server.figure("vllm:time_to_first_token_seconds_count") > 0
    assert server.figure("quire:kv_blocks") > 0
