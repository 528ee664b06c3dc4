"""What `tool_choice` and `strict` mean before a grammar is made of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quire.constraints import StructuredOutputsParams
from quire.errors import RequestError
from quire.request import SamplingParams
from quire.server.answer_forms import with_form
from quire.server.answer_parsing import Parsers
from quire.server.json_calls import JsonCallParser
from quire.server.protocol.chat import ChatCompletionRequest
from quire.server.protocol.parsing import parse
from quire.server.protocol.responses import ResponsesRequest, to_chat_tools
from quire.server.protocol.tool_choice import ToolUse

FUNCTION: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}, "strict": True}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def chat(*functions: dict[str, Any], **fields: Any) -> ChatCompletionRequest:
    tools = [{"type": "function", "function": function} for function in functions]
    body = {**CHAT, **({"tools": tools} if tools else {}), **fields}
    return parse(json.dumps(body).encode(), ChatCompletionRequest)


def flat(*functions: dict[str, Any], **fields: Any) -> ResponsesRequest:
    tools = [{"type": "function", **function} for function in functions]
    body = {"model": "m", "input": "x", "tools": tools, **fields}
    return parse(json.dumps(body).encode(), ResponsesRequest)


@pytest.mark.parametrize(
    ("choice", "fields"),
    [
        (None, (["f", "g"], False, False)),
        ("auto", (["f", "g"], False, False)),
        ("none", ([], False, False)),
        ("required", (["f", "g"], True, False)),
        ("g", (["g"], True, True)),
        (("auto", ["g"]), (["g"], False, False)),
        (("required", ["g", "f"]), (["g", "f"], True, False)),
    ],
)
def test_both_spellings_mean_the_same(choice: Any, fields: Any) -> None:
    other = {**FUNCTION, "name": "g"}
    nested = {"type": "function", "function": {"name": "g"}} if choice == "g" else choice
    level = {"type": "function", "name": "g"} if choice == "g" else choice

    if isinstance(choice, tuple):
        mode, names = choice
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        nested = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
        tools = [{"type": "function", "name": name} for name in names]
        level = {"type": "allowed_tools", "mode": mode, "tools": tools}

    uses = [
        chat(FUNCTION, other, tool_choice=nested).tool_use(),
        flat(FUNCTION, other, tool_choice=level).tool_use(),
    ]

    assert [(use.names, use.is_forced, use.is_named) for use in uses] == [fields, fields]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"type": "function", "function": {"name": "g"}}, "'g', which is none .* allowed: f"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "h"}}],
                },
            },
            "'h', which is none",
        ),
        ({"type": "custom"}, "tool_choice.type is .custom.; allowed: none, auto, required"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "any", "tools": []}},
            "auto, required",
        ),
        (5, "tool_choice is 5; allowed: none, auto"),
    ],
    ids=str,
)
def test_what_is_no_choice_is_refused(choice: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        chat(FUNCTION, tool_choice=choice).tool_use()

    assert caught.value.parameter == "tool_choice"


def test_a_template_is_not_told_of_strict() -> None:
    told = {"name": "f", "parameters": {"type": "object"}}

    assert chat(FUNCTION).template_options()["tools"] == [{"type": "function", "function": told}]
    assert to_chat_tools(flat(FUNCTION)) == [{"type": "function", "function": told}]


def schema_of(parameters: Any) -> Any:
    """Return the schema that forced arguments are held to."""
    use = chat({"name": "f", "parameters": parameters}, tool_choice="required").tool_use()
    form = with_form(SamplingParams(), use, Parsers(tool_call=JsonCallParser), "")
    assert form.structured_outputs is not None
    (calls,) = [n for n in form.structured_outputs.source.tree["elements"] if "tags" in n]
    return calls["tags"][0]["content"]["json_schema"]


CLOSED = {"additionalProperties": False}
A = {"properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (None, {"type": "object", "properties": {}, **CLOSED}),
        ({}, {"type": "object"}),
        ({"type": ["object", "null"]}, {"type": "object"}),
        (A, {"type": "object", **A, **CLOSED}),
        (
            {**A, "additionalProperties": True},
            {"type": "object", **A, "additionalProperties": True},
        ),
        ({**A, "allOf": [{}]}, {"type": "object", **A, "allOf": [{}]}),
        (
            {"properties": {"b": {"type": "array", "items": A}}},
            {
                "type": "object",
                "properties": {"b": {"type": "array", "items": {**A, **CLOSED}}},
                **CLOSED,
            },
        ),
    ],
    ids=str,
)
def test_arguments_are_an_object_of_the_properties_that_are_listed(given: Any, held: Any) -> None:
    assert schema_of(given) == held


def test_a_form_of_vllms_beside_a_forced_call_is_refused() -> None:
    form = StructuredOutputsParams(regex="a", asked_as="guided_regex")
    use = ToolUse(functions=chat(FUNCTION).tool_use().functions, is_forced=True)
    params = SamplingParams(structured_outputs=form)

    with pytest.raises(RequestError, match="guided_regex asks for a form") as caught:
        with_form(params, use, Parsers(tool_call=JsonCallParser), "")

    assert caught.value.parameter == "guided_regex"
