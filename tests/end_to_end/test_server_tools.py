"""A coffee dialogue with tools: OpenAI's client against `quire serve demo --tool-call-parser`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import QUIRE, Server, serving

import quire_models.demo

TOOLS = json.loads(Path(quire_models.demo.__file__).with_name("tools.json").read_text())
ASKED: list[Any] = [{"role": "user", "content": "I would like to get an Americano."}]
GREEDY: dict[str, Any] = {"model": "demo", "tools": TOOLS, "temperature": 0, "max_tokens": 100}
AMERICANO = {"query": "Americano"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--tool-call-parser", "demo", "--enable-auto-tool-choice") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_a_dialogue_goes_on_with_the_result_of_its_call(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(messages=ASKED, tool_choice="auto", **GREEDY).choices[0]
    (call,) = first.message.tool_calls or ()
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"menu_items":[]}'}
    told = [*ASKED, first.message.model_dump(), result]
    second = client.chat.completions.create(messages=told, **GREEDY).choices[0]

    assert (first.finish_reason, first.message.content) == ("tool_calls", None)
    assert call.function.name == "get_menu_items"
    assert json.loads(call.function.arguments) == AMERICANO
    assert second.finish_reason == "stop"
    assert second.message.content
    assert not second.message.tool_calls


def test_a_streamed_call_comes_in_pieces(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(messages=ASKED, stream=True, **GREEDY)

    choices = [chunk.choices[0] for chunk in stream]

    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert [call.function.name for call in calls if call.id] == ["get_menu_items"]
    assert len(calls) > 2
    assert json.loads("".join(call.function.arguments for call in calls)) == AMERICANO
    assert choices[-1].finish_reason == "tool_calls"
    assert "".join(choice.delta.content or "" for choice in choices) == ""


def test_openais_own_accumulator_reads_the_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=ASKED, n=2, **GREEDY) as stream:
        answer = stream.get_final_completion()

    for choice in answer.choices:
        (call,) = choice.message.tool_calls or ()
        assert json.loads(call.function.arguments) == AMERICANO


def test_without_tools_or_their_choice_an_answer_is_text(client: openai.OpenAI) -> None:
    without = {name: value for name, value in GREEDY.items() if name != "tools"}

    none = client.chat.completions.create(messages=ASKED, tool_choice="none", **GREEDY).choices[0]
    plain = client.chat.completions.create(messages=ASKED, **without).choices[0]

    assert none.message.content == plain.message.content
    assert none.finish_reason == "stop"
    assert none.message.tool_calls is None


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "show_menu"}}], ids=str
)
def test_forced_tools_are_refused(client: openai.OpenAI, choice: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="tool_choice is .*; allowed: none, auto"):
        client.chat.completions.create(messages=ASKED, tool_choice=choice, **GREEDY)


def test_a_response_has_the_call_as_an_item_and_takes_its_result(client: openai.OpenAI) -> None:
    flat: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    common: Any = {"model": "demo", "tools": flat, "temperature": 0, "max_output_tokens": 100}

    first = client.responses.create(input=ASKED, **common)
    (call,) = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "{}"}
    told: Any = [*ASKED, call.model_dump(exclude_none=True), result]
    second = client.responses.create(input=told, **common)
    with client.responses.stream(input=ASKED, **common) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()

    assert (call.type, call.name) == ("function_call", "get_menu_items")
    assert json.loads(call.arguments) == AMERICANO
    assert second.status == "completed"
    assert kinds.count("response.function_call_arguments.delta") > 1
    assert streamed.output[0].arguments == call.arguments


def test_thoughts_are_told_apart_and_auto_needs_a_parser() -> None:
    """The demo never ends its thoughts, which DeepSeek's parser sees from the first word on."""
    body = {"model": "demo", "messages": ASKED, "temperature": 0, "max_tokens": 20}
    with serving("--reasoning-parser", "deepseek_r1") as running:
        url = running.url + "/v1/chat/completions"
        refused = httpx.post(url, json={**body, "tools": TOOLS, "tool_choice": "auto"})
        answer = httpx.post(url, json=body).json()["choices"][0]["message"]
        chunks = httpx.post(url, json={**body, "stream": True}).text

    assert refused.status_code == 400
    assert "--tool-call-parser" in refused.json()["error"]["message"]
    assert answer["reasoning_content"]
    assert answer["content"] == ""
    lines = [line[6:] for line in chunks.splitlines() if line.startswith("data: {")]
    told = [json.loads(line)["choices"][0]["delta"].get("reasoning_content", "") for line in lines]
    assert "".join(told) == answer["reasoning_content"]


def test_an_unknown_parser_ends_the_start_with_the_nearest() -> None:
    command = [str(QUIRE), "serve", "demo", "--port", "0", "--tool-call-parser", "hermess"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert "unknown tool-call parser 'hermess'" in done.stderr
    assert "Did you mean 'hermes'?" in done.stderr
