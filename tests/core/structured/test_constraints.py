"""A form is one of five, within bounds, or an error that names what is wrong."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from quire.constraints import GrammarKind, StructuredOutputsParams
from quire.errors import RequestError
from quire.request import Request, SamplingParams
from quire.server.messages import decode_to_engine, encoded_add, request_of


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "has no form"),
        ({"json": {}, "regex": "a"}, "has json and regex"),
        ({"json_object": False}, "has no form"),
        ({"json_object": 1}, "json_object is true"),
        ({"jason": {}}, "has 'jason'; allowed"),
        ({"disable_any_whitespace": True, "regex": "a"}, "has 'disable_any_whitespace'"),
        ({"regex": ""}, "a regex that is no text"),
        ({"regex": "a" * 9000}, "a regex of 9000 characters"),
        ({"regex": "\ud800"}, "half a surrogate pair"),
        ({"grammar": 5}, "a grammar that is no text"),
        ({"choice": []}, "a choice that is not allowed"),
        ({"choice": "yes"}, "a choice that is not allowed"),
        ({"choice": ["a", ""]}, "a choice that is not allowed"),
        ({"choice": ["a"] * 5000}, "a choice that is not allowed"),
        ({"json": "{"}, "a schema that is no JSON"),
        ({"json": "5"}, "neither an object nor"),
        ({"json": [1]}, "neither an object nor"),
        ({"json": {"minimum": float("nan")}}, "a schema that is no JSON"),
        ({"json": {"a": object()}}, "a schema that is no JSON"),
        ({"json": nested(100)}, "nested deeper than allowed"),
        ({"json": "[" * 100_000}, "a schema that is no JSON"),
        ({"json": {"enum": list(range(40_000))}}, "too many values"),
        ({"json": {"enum": ["x" * 5_000_000]}}, "a schema of 5000014 characters"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_forms_are_refused_at_once(given: dict[str, Any], message: str) -> None:
    begin = time.perf_counter()

    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(structured_outputs=given)

    assert caught.value.parameter == "structured_outputs"
    assert len(str(caught.value)) < 400
    assert time.perf_counter() - begin < 1


def test_a_form_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(RequestError, match="structured_outputs is a str"):
        SamplingParams(structured_outputs="json")  # type: ignore[arg-type]


def test_a_schema_may_be_a_mapping_or_its_text() -> None:
    schema = {"properties": {"b": True, "a": {"const": "ü"}}}

    found = [StructuredOutputsParams(json=s).source for s in (schema, json.dumps(schema))]

    assert found[0] == found[1]
    assert found[0].kind is GrammarKind.JSON_SCHEMA
    assert json.loads(found[0].text) == schema


def test_errors_name_the_field_that_asked() -> None:
    with pytest.raises(RequestError, match=r"^response_format has a schema") as caught:
        StructuredOutputsParams(json="{", asked_as="response_format")

    assert caught.value.parameter == "response_format"


def test_forms_travel_to_the_engines_process() -> None:
    form = StructuredOutputsParams(choice=["a", "b"], asked_as="guided_choice")
    params = SamplingParams(structured_outputs=form)
    request = Request(request_id="r", prompt_token_ids=(1,), params=params, max_tokens=4, seed=0)

    arrived = request_of(decode_to_engine(encoded_add(request)), 0.0)  # type: ignore[arg-type]

    assert arrived.params == params
