"""`quire serve demo` as a process, asked by the official client and by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import Server, events_of, serving

from quire import LLM, SamplingParams

CHAT = [{"role": "user", "content": "A large latte, please."}]
CHAT_PATH = "/v1/chat/completions"
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


def test_stream_echoes_each_prompt_before_its_answer(server: Server) -> None:
    body = {**GREEDY, "prompt": ["I want", "A latte"], "echo": True, "logprobs": 1}
    whole = httpx.post(server.url + "/v1/completions", json=body).json()["choices"]

    pieces = stream(server, "/v1/completions", body)[:-1]

    for choice in whole:
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            joined = [v for piece in own if piece["logprobs"] for v in piece["logprobs"][name]]
            assert joined == choice["logprobs"][name]


def test_echo_without_tokens_gives_the_prompt_alone(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        prompt="I want",
        echo=True,
        **{**GREEDY, "max_tokens": 0},
        extra_body={"return_token_ids": True},
    )

    assert answer.choices[0].text == "I want"
    assert answer.choices[0].token_ids == []
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 0)


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


@pytest.mark.parametrize(
    ("path", "asked", "expected"),
    [
        ("/v1/completions", {"prompt": "Hi"}, "cmpl-mine-2"),
        (CHAT_PATH, {"messages": CHAT}, "chatcmpl-mine-2"),
        ("/v1/responses", {"input": "Hi"}, "resp_mine-2"),
    ],
)
def test_answer_is_called_by_its_request_id(
    server: Server, path: str, asked: dict[str, Any], expected: str
) -> None:
    body = {"model": "demo", "request_id": "mine-2", "temperature": 0, **asked}

    answer = httpx.post(server.url + path, json=body)

    assert answer.json()["id"] == expected


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


def test_choices_of_a_stream_begin_in_order(server: Server) -> None:
    body = {**GREEDY, "prompt": ["I want", "Hello", "Two"], "n": 3, "temperature": 1}

    chunks = stream(server, "/v1/completions", body)[:-1]

    begun = dict.fromkeys(chunk["choices"][0]["index"] for chunk in chunks)
    assert list(begun) == list(range(9))


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


def test_response_equals_the_chat_answer(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="demo", input="A large latte, please.", temperature=0, max_output_tokens=12
    )

    chat = client.chat.completions.create(messages=CHAT, **GREEDY)  # type: ignore[arg-type]
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == (
        "incomplete" if chat.choices[0].finish_reason == "length" else "completed"
    )
    assert answer.usage is not None
    assert answer.usage.output_tokens == chat.usage.completion_tokens


@pytest.mark.parametrize("limit", [12, 400])
def test_streamed_response_builds_up_the_whole_one(client: openai.OpenAI, limit: int) -> None:
    options: dict[str, Any] = {"model": "demo", "input": CHAT, "temperature": 0}
    whole = client.responses.create(**options, max_output_tokens=limit)

    events = list(client.responses.create(**options, max_output_tokens=limit, stream=True))

    kinds = [event.type for event in events]
    assert whole.status == ("incomplete" if limit == 12 else "completed")
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{whole.status}"
    assert kinds.count("response.output_text.done") == 1
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == whole.output_text
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text


def test_streaming_helpers_of_the_client_accumulate(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "temperature": 0}
    whole = client.responses.create(**options, input=CHAT, max_output_tokens=400)

    with client.responses.stream(**options, input=CHAT, max_output_tokens=400) as running:
        assert running.get_final_response().output_text == whole.output_text
    with client.chat.completions.stream(**options, messages=CHAT, max_tokens=400) as chat:
        assert chat.get_final_completion().choices[0].message.content == whole.output_text


def test_logprobs_of_chat_are_the_best_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=CHAT,
        logprobs=True,
        top_logprobs=3,
        **GREEDY,  # type: ignore[arg-type]
    )

    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert answer.usage is not None
    assert len(found.content) == answer.usage.completion_tokens
    for entry in found.content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert len(entry.top_logprobs) == 3


def test_echo_gives_the_prompts_logprobs_as_offline(client: openai.OpenAI, offline: LLM) -> None:
    options = {**GREEDY, "max_tokens": 1}

    answer = client.completions.create(prompt="I want a latte", echo=True, logprobs=1, **options)

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    (expected,) = offline.generate(["I want a latte"], params, use_tqdm=False)
    assert expected.prompt_logprobs is not None
    wanted = [
        None if entry is None else entry[token_id].logprob
        for token_id, entry in zip(expected.prompt_token_ids, expected.prompt_logprobs, strict=True)
    ]
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:-1] == pytest.approx(wanted[1:], abs=1e-3)
    assert "".join(found.tokens or []) == answer.choices[0].text


@pytest.mark.parametrize("echo", [False, True])
def test_prompt_logprobs_equal_offline(server: Server, offline: LLM, echo: bool) -> None:
    body = {**GREEDY, "prompt_logprobs": 2, "max_tokens": 1}
    own = {"echo": True, "logprobs": 0} if echo else {}

    answer = httpx.post(
        server.url + "/v1/completions", json={**body, "prompt": ["I want a", "Hi"], **own}
    ).json()

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    for choice, expected in zip(
        answer["choices"], offline.generate(["I want a", "Hi"], params, use_tqdm=False), strict=True
    ):
        found = choice["prompt_logprobs"]
        assert found[0] is None
        assert expected.prompt_logprobs is not None
        for entry, wanted in zip(found[1:], expected.prompt_logprobs[1:], strict=True):
            assert wanted is not None
            assert {int(i): (v["rank"], v["decoded_token"]) for i, v in entry.items()} == {
                i: (v.rank, v.decoded_token) for i, v in wanted.items()
            }
            values = {int(i): v["logprob"] for i, v in entry.items()}
            assert values == pytest.approx({i: v.logprob for i, v in wanted.items()}, abs=1e-3)


def test_prompt_logprobs_of_a_chat_stand_beside_its_choices(server: Server) -> None:
    body = {**GREEDY, "messages": CHAT, "prompt_logprobs": 0}

    answer = httpx.post(server.url + CHAT_PATH, json=body).json()

    first, *others = answer["prompt_logprobs"]
    assert first is None
    assert len(others) == answer["usage"]["prompt_tokens"] - 1
    assert all(len(entry) == 1 for entry in others)


def test_logprobs_name_tokens_by_their_ids_where_asked(client: openai.OpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True}

    answer = client.completions.create(prompt="I", logprobs=1, **GREEDY, extra_body=extra)
    chat = client.chat.completions.create(
        messages=CHAT,
        logprobs=True,
        top_logprobs=1,
        **GREEDY,  # type: ignore[arg-type]
        extra_body=extra,
    )

    for choice, tokens in (
        (answer.choices[0], answer.choices[0].logprobs.tokens),
        (chat.choices[0], [entry.token for entry in chat.choices[0].logprobs.content]),
    ):
        assert tokens == [f"token_id:{i}" for i in choice.token_ids]
    assert next(iter(answer.choices[0].logprobs.top_logprobs[0])).startswith("token_id:")


def test_logit_bias_forces_a_token(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="I", logit_bias={"300": 100}, **GREEDY)

    repeated = client.completions.create(
        prompt=[300] * 12, echo=True, **{**GREEDY, "max_tokens": 0}
    )
    assert answer.choices[0].text == repeated.choices[0].text


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


def test_figures_count_requests_and_tokens(server: Server, client: openai.OpenAI) -> None:
    before = server.figure("vllm:generation_tokens_total")

    client.completions.create(prompt="I want", **GREEDY, extra_body={"ignore_eos": True})

    server.wait_until_idle()
    assert server.figure("vllm:generation_tokens_total") == before + 12
    assert server.figure("vllm:time_to_first_token_seconds_count") > 0
    assert server.figure("quire:kv_blocks") > 0
