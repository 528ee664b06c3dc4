"""Messages, tools and variables are checked before a template sees them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import RequestError
from quire.text.messages import (
    MAX_CHAT_BYTES,
    MAX_MESSAGES,
    validate_messages,
    validate_tools,
    validate_variables,
)

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **fields}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_plain_messages_pass_as_they_are() -> None:
    messages = [{"role": "system", "content": "a"}, user("b"), assistant(content="c")]

    assert validate_messages(messages) == messages


def test_the_callers_messages_are_not_changed() -> None:
    call = {**CALL, "function": dict(CALL["function"])}  # type: ignore[arg-type]
    messages = [assistant(content=None, tool_calls=[call], reasoning="r")]

    validate_messages(messages)

    assert messages == [assistant(content=None, tool_calls=[call], reasoning="r")]
    assert call["function"]["arguments"] == '{"a": 1}'  # type: ignore[index]


def test_fields_that_are_null_are_left_out() -> None:
    (message,) = validate_messages([assistant(content="x", refusal=None, tool_calls=None)])

    assert message == assistant(content="x")


def test_empty_tool_calls_are_left_out() -> None:
    assert validate_messages([assistant(content="x", tool_calls=[])]) == [assistant(content="x")]


@pytest.mark.parametrize(
    ("given_arguments", "seen"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {}), ("  ", {}), ("{}", {})],
)
def test_the_arguments_of_a_tool_call_become_an_object(given_arguments: Any, seen: Any) -> None:
    call = {"id": "c1", "function": {"name": "f", "arguments": given_arguments}}

    (message,) = validate_messages([assistant(content=None, tool_calls=[call])])

    assert "content" not in message
    assert message["tool_calls"] == [{"id": "c1", "function": {"name": "f", "arguments": seen}}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "a"},
        {"type": "output_text", "text": "a", "annotations": []},
        {"type": "refusal", "refusal": "a"},
        "a",
    ],
)
def test_every_kind_of_text_part_becomes_a_text_part(part: Any) -> None:
    (message,) = validate_messages([user([part])])

    assert message["content"] == [{"type": "text", "text": "a"}]


def test_reasoning_is_found_under_the_names_that_templates_read() -> None:
    (message,) = validate_messages([assistant(content="x", reasoning="why")])

    assert message["reasoning_content"] == message["thinking"] == "why"


BAD: dict[str, tuple[Any, str]] = {
    "none": (None, "messages is a NoneType"),
    "text": ("hi", "messages is a str"),
    "object": ({"role": "user"}, "messages is a dict"),
    "empty": ([], "messages has 0 entries"),
    "too_many": ([user("x")] * (MAX_MESSAGES + 1), "messages has 16385 entries"),
    "not_object": ([user("x"), "hi"], "messages[1] is a str"),
    "no_role": ([{"content": "x"}], "messages[0] has the role None"),
    "wizard": (
        [user("a"), {"role": "wizard", "content": "x"}],
        "messages[1] has the role 'wizard'",
    ),
    "role_number": ([{"role": 5, "content": "x"}], "messages[0] has the role 5"),
    "role_list": ([{"role": ["user"], "content": "x"}], "messages[0] has the role ['user']"),
    "long_role": ([{"role": "x" * 99999, "content": "x"}], "messages[0] has the role 'xxx"),
    "null": ([user(None)], "messages[0] has no content"),
    "no_content": ([{"role": "user"}], "messages[0] has no content"),
    "number": ([user(5)], "messages[0] has content 5"),
    "no_parts": ([user([])], "messages[0] has content []"),
    "image": (
        [user([{"type": "image_url", "image_url": {"url": "http://x"}}])],
        "messages[0].content[0] has the type 'image_url'",
    ),
    "part_number": ([user([5])], "messages[0].content[0] has the type None"),
    "part_text": ([user([{"type": "text", "text": 5}])], "messages[0].content[0] has text 5"),
    "user_calls": (
        [{"role": "user", "content": "x", "tool_calls": [CALL]}],
        "messages[0] has tool_calls but the role user",
    ),
    "calls_text": ([assistant(tool_calls="x")], "messages[0] has tool_calls 'x'"),
    "call_name": ([assistant(tool_calls=[{}])], "messages[0].tool_calls[0] needs a function"),
    "bad_json": (
        [assistant(tool_calls=[{"function": {"name": "f", "arguments": "{bad"}}])],
        "messages[0].tool_calls[0] has arguments that are not JSON",
    ),
    "json_list": (
        [assistant(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])],
        "messages[0].tool_calls[0] has arguments that are not a JSON object",
    ),
    "deep_json": (
        [assistant(tool_calls=[{"function": {"name": "f", "arguments": "[" * 99999}}])],
        "messages[0].tool_calls[0] has arguments that are not JSON",
    ),
    "function_call": ([assistant(function_call={"name": "f"})], "has function_call"),
    "surrogate": ([user("a\ud83d")], "messages has half a surrogate pair"),
    "surrogate_key": ([{**user("a"), "\ud83d": 1}], "messages has half a surrogate pair"),
    "object_value": ([{**user("x"), "extra": object()}], "messages has a value"),
    "infinite": ([{**user("x"), "extra": float("inf")}], "messages has a value"),
    "deep": ([{**user("x"), "extra": deep(10_000)}], "messages has a value"),
    "huge": ([user("x" * (MAX_CHAT_BYTES + 1))], "messages takes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_message_is_refused_by_name_without_echoing_it(name: str) -> None:
    messages, said = BAD[name]

    with pytest.raises(RequestError) as error:
        validate_messages(messages)

    assert error.value.parameter == "messages"
    assert said in str(error.value)
    assert len(str(error.value)) < 400


def test_fifty_thousand_bad_messages_are_refused_at_once() -> None:
    messages = [user(5)] * 50_000
    start = time.process_time()

    with pytest.raises(RequestError):
        validate_messages(messages)

    assert time.process_time() - start < 0.05


leaves = st.sampled_from([None, True, 5, 0.5, "", "x", "{}", "[1]", "user", "assistant", "tool"])
names = st.sampled_from(["role", "content", "tool_calls", "name", "function", "type", "text"])
nested = st.dictionaries(names, leaves, max_size=3)
values = leaves | nested | st.lists(nested, max_size=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(names, values, max_size=4), max_size=3))
def test_any_messages_are_accepted_or_refused_as_a_request_error(messages: Any) -> None:
    said = ""
    try:
        checked = validate_messages(messages)
    except RequestError as error:
        said = str(error)
    else:
        assert [m["role"] for m in checked] == [m["role"] for m in messages]
    assert len(said) < 400


def test_tools_are_optional() -> None:
    assert validate_tools(None) is None
    tool = {"type": "function", "function": {"name": "f"}}
    assert validate_tools([tool]) == [tool]


@pytest.mark.parametrize("tools", [[], "x", {}, [5], [{}], [{"function": {}}], [{"function": 5}]])
def test_bad_tools_are_refused(tools: Any) -> None:
    with pytest.raises(RequestError) as error:
        validate_tools(tools)

    assert error.value.parameter == "tools"


@pytest.mark.parametrize(
    "variables",
    [5, {"messages": 1}, {"conversation": 1}, {"__class__": 1}, {1: 2}, {"x": object()}],
)
def test_bad_variables_are_refused(variables: Any) -> None:
    with pytest.raises(RequestError) as error:
        validate_variables(variables)

    assert error.value.parameter == "chat_template_kwargs"
