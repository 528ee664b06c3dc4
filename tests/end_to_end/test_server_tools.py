"""A coffee dialogue with tools: OpenAI's client against `quire serve demo --tool-call-parser`."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
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


@pytest.mark.parametrize("text", ["I would like to get an Americano.", "Hello!"])
def test_required_gives_a_call_whole_and_streamed(client: openai.OpenAI, text: str) -> None:
    asked: Any = [{"role": "user", "content": text}]

    whole = client.chat.completions.create(messages=asked, tool_choice="required", **GREEDY)
    with client.chat.completions.stream(messages=asked, tool_choice="required", **GREEDY) as stream:
        streamed = stream.get_final_completion()

    for answer in (whole, streamed):
        (call,) = answer.choices[0].message.tool_calls or ()
        assert answer.choices[0].finish_reason == "tool_calls"
        assert not answer.choices[0].message.content
        assert call.function.name == "get_menu_items"
        assert set(json.loads(call.function.arguments)) == {"query"}


def test_a_named_function_is_called_and_finishes_as_openais(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "show_menu"}}

    answer = client.chat.completions.create(messages=ASKED, tool_choice=choice, **GREEDY)

    (call,) = answer.choices[0].message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("show_menu", "{}")
    assert answer.choices[0].finish_reason == "stop"


def test_a_strict_function_leaves_the_model_its_text(client: openai.OpenAI) -> None:
    hello: Any = [{"role": "user", "content": "Hello!"}]
    strict: Any = [
        {"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS
    ]

    text = client.chat.completions.create(messages=hello, **{**GREEDY, "tools": strict})
    call = client.chat.completions.parse(messages=ASKED, **{**GREEDY, "tools": strict})

    assert text.choices[0].message.content
    assert not text.choices[0].message.tool_calls
    (found,) = call.choices[0].message.tool_calls or ()
    assert found.function.parsed_arguments == AMERICANO


def test_a_strict_schema_holds_at_any_temperature(client: openai.OpenAI) -> None:
    """The demo never writes such arguments by itself."""
    parameters = {
        "type": "object",
        "properties": {"query": {"enum": ["x1", "y2"]}, "count": {"type": "integer"}},
        "required": ["query", "count"],
        "additionalProperties": False,
    }
    function = {"name": "get_menu_items", "parameters": parameters, "strict": True}
    others = [tool for tool in TOOLS if tool["function"]["name"] != "get_menu_items"]
    tools: Any = [{"type": "function", "function": function}, *others]

    answer = client.chat.completions.create(
        messages=ASKED, n=8, seed=1, **{**GREEDY, "tools": tools, "temperature": 1}
    )

    calls = [
        call.function
        for choice in answer.choices
        for call in choice.message.tool_calls or ()
        if call.function.name == "get_menu_items"
    ]
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), parameters)


def test_without_parallel_calls_there_is_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=ASKED,
        tool_choice="required",
        parallel_tool_calls=False,
        n=8,
        seed=1,
        **{**GREEDY, "temperature": 1.5},
    )

    ended = [c for c in answer.choices if c.finish_reason == "tool_calls"]
    assert ended
    assert all(len(choice.message.tool_calls or ()) == 1 for choice in ended)


def test_tools_and_a_form_give_a_call_or_the_form(client: openai.OpenAI) -> None:
    schema = {"enum": [{"a": 1}]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    hello: Any = [{"role": "user", "content": "Hello!"}]

    call = client.chat.completions.create(messages=ASKED, response_format=form, **GREEDY)
    text = client.chat.completions.create(
        messages=hello, response_format=form, tool_choice="none", **GREEDY
    )

    assert call.choices[0].message.tool_calls
    assert json.loads(text.choices[0].message.content or "") == {"a": 1}


NESTED: dict[str, Any] = {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}
UNIQUE = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}


def strict_tools(parameters: Any, number: int = 1) -> list[Any]:
    function = {"parameters": parameters, "strict": True}
    names = [f"f{i}" for i in range(number)]
    return [{"type": "function", "function": {"name": name, **function}} for name in names]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tool_choice": "any"}, "tool_choice", 'is "any"; allowed: none, auto, required'),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "function is missing"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "nope"}}},
            "tool_choice",
            "names 'nope', which is none of the tools; allowed: show_menu, get_menu_items",
        ),
        ({"tool_choice": "required", "tools": None}, "tool_choice", "is required and needs tools"),
        ({"tool_choice": "required", "stop": ["x"]}, "stop", "would cut the call"),
        ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex", "leave one of them out"),
        ({"tools": strict_tools(UNIQUE)}, "tools", "uniqueItems"),
        ({"tools": strict_tools(UNIQUE), "tool_choice": "required"}, "tools", "f0"),
        ({"tools": strict_tools(NESTED)}, "tools", "never end"),
        ({"tools": strict_tools({"type": "array"})}, "tools", 'type "array" .* allowed: object'),
        ({"tools": strict_tools({"description": "x" * 5_000_000})}, "tools", "allowed: up to"),
        ({"tools": strict_tools({"enum": [{"a": "x" * 200_000}]}, 2)}, "tools", "262144"),
        (
            {"tools": strict_tools({"type": "object"}, 200)},
            "tools",
            "200 entries; .* 1 to 128",
        ),
        ({"tools": strict_tools({}), "min_tokens": 5}, "tools", "min_tokens"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_forced_is_a_400_within_a_second(
    server: Server, fields: dict[str, Any], param: str, said: str
) -> None:
    body = {**GREEDY, "messages": ASKED, **fields}
    begin_s = time.perf_counter()

    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert re.search(said, error["message"]), error
    assert time.perf_counter() - begin_s < 1


def test_a_response_is_forced_by_the_flat_form(client: openai.OpenAI) -> None:
    flat: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    common: Any = {"model": "demo", "tools": flat, "temperature": 0, "max_output_tokens": 100}
    choice: Any = {"type": "function", "name": "show_menu"}

    named = client.responses.create(input="Hello!", tool_choice=choice, **common)
    required = client.responses.create(input="Hello!", tool_choice="required", **common)

    assert [(item.type, item.name) for item in named.output] == [("function_call", "show_menu")]
    assert named.tool_choice.model_dump() == choice
    assert [item.name for item in required.output] == ["get_menu_items"]


def test_a_response_has_the_call_as_an_item_and_takes_its_result(client: openai.OpenAI) -> None:
    flat: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    common: Any = {"model": "demo", "tools": flat, "temperature": 0, "max_output_tokens": 100}

    first = client.responses.create(input=ASKED, **common)
    (call,) = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "{}"}
    told: Any = [*ASKED, call.model_dump(exclude_none=True), result]
    second = client.responses.create(input=told, **common)
    with client.responses.stream(input=ASKED, **common) as stream:
        streamed = stream.get_final_response()

    assert (call.type, call.name) == ("function_call", "get_menu_items")
    assert json.loads(call.arguments) == AMERICANO
    assert second.status == "completed"
    assert streamed.output[0].arguments == call.arguments


def test_arguments_of_a_response_come_in_parts(client: openai.OpenAI) -> None:
    # Long ones: what is generated while the server is busy with else comes in one part.
    text = {"type": "string", "minLength": 300, "maxLength": 310}
    parameters = {"type": "object", "properties": {"text": text}, "required": ["text"]}
    parameters["additionalProperties"] = False
    note: Any = {"type": "function", "name": "note", "parameters": parameters, "strict": True}
    common: Any = {"model": "demo", "tools": [note], "tool_choice": "required", "temperature": 0}

    with client.responses.stream(input="Hello!", max_output_tokens=400, **common) as stream:
        kinds = [event.type for event in stream]
        (call,) = stream.get_final_response().output

    assert kinds.count("response.function_call_arguments.delta") > 1
    assert 300 <= len(json.loads(call.arguments)["text"]) <= 310


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


def test_forced_calls_need_no_parser_and_strict_ones_say_so() -> None:
    strict: Any = [
        {"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS
    ]
    with serving() as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)
        whole = client.chat.completions.create(
            messages=ASKED, tool_choice="required", parallel_tool_calls=False, **GREEDY
        )
        with client.chat.completions.stream(
            messages=ASKED, tool_choice="required", parallel_tool_calls=False, **GREEDY
        ) as stream:
            streamed = stream.get_final_completion()
        choice: Any = {"type": "function", "function": {"name": "get_menu_items"}}
        named = client.chat.completions.create(messages=ASKED, tool_choice=choice, **GREEDY)
        with pytest.raises(openai.BadRequestError, match="strict function.*--tool-call-parser"):
            client.chat.completions.create(messages=ASKED, **{**GREEDY, "tools": strict})

    for answer in (whole, streamed, named):
        (call,) = answer.choices[0].message.tool_calls or ()
        assert call.function.name == "get_menu_items"
        assert json.loads(call.function.arguments) == AMERICANO


def test_a_parser_without_a_mark_cannot_hold_calls_within_text() -> None:
    tools = strict_tools({"type": "object", "properties": {}})
    body = {"model": "demo", "messages": ASKED, "temperature": 0, "tools": tools}
    with serving("--tool-call-parser", "pythonic") as running:
        url = running.url + "/v1/chat/completions"
        refused = httpx.post(url, json=body)
        forced = httpx.post(
            url, json={**body, "tool_choice": "required", "parallel_tool_calls": False}
        ).json()["choices"][0]

    assert refused.status_code == 400
    assert "no mark that begins a call" in refused.json()["error"]["message"]
    (call,) = forced["message"]["tool_calls"]
    assert call["function"] == {"name": "f0", "arguments": "{}"}


def test_an_unknown_parser_ends_the_start_with_the_nearest() -> None:
    command = [str(QUIRE), "serve", "demo", "--port", "0", "--tool-call-parser", "hermess"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert "unknown tool-call parser 'hermess'" in done.stderr
    assert "Did you mean 'hermes'?" in done.stderr
