"""Numbers beside exclusive bounds: what llguidance allows is what a schema allows."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema
import pytest

pytest.importorskip("llguidance")
from llguidance import LLMatcher, LLTokenizer

from quire_grammar.llguidance.bounds import with_exact_bounds

BYTES = LLTokenizer("byte")
VALUES = (-6.5, -6, -0.5, 0, 0.125, 0.5, 5, 5.5, 6, 1000000, 1000000.5)
TEXTS = (
    "-6",
    "-6.0",
    "-6.25",
    "-0",
    "-0.0",
    "0",
    "0.0",
    "0.05",
    "5",
    "5.0",
    "5.25",
    "6",
    "1000000",
)
BOUNDS = [
    {low: a, high: b}
    for a, b in itertools.product(VALUES, VALUES)
    for low in ("minimum", "exclusiveMinimum")
    for high in ("maximum", "exclusiveMaximum")
    if a < b
]


def accepts(schema: dict[str, Any], text: str) -> bool:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(with_exact_bounds(schema)))
    matcher = LLMatcher(BYTES, grammar)
    assert not matcher.is_error(), matcher.get_error()
    is_read = matcher.try_consume_tokens(list(text.encode())) == len(text)
    return is_read and matcher.is_accepting()


@pytest.mark.parametrize("keyword", ["exclusiveMinimum", "exclusiveMaximum"])
def test_no_number_is_allowed_that_the_schema_forbids(keyword: str) -> None:
    schemas = [{"type": "number", **bounds} for bounds in BOUNDS if keyword in bounds]
    allowed = [(one, text) for one in schemas for text in TEXTS if accepts(one, text)]

    wrong = [
        (schema, text)
        for schema, text in allowed
        if not jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    ]

    assert len(allowed) > len(schemas)
    assert wrong == []


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "number", "exclusiveMinimum": 5}, {"maximum": 5.5}]},
        {"$ref": "#/$defs/a", "maximum": 5.5, "$defs": {"a": {"exclusiveMinimum": 5}}},
        {"$ref": "#/$defs/enum", "$defs": {"enum": {"exclusiveMinimum": 5, "maximum": 5.5}}},
    ],
)
def test_bounds_in_different_parts_are_kept(schema: dict[str, Any]) -> None:
    assert not accepts(schema, "5")
    assert accepts(schema, "5.25")


def test_whole_numbers_and_what_is_no_bound_stay_as_they_are() -> None:
    schema = {"type": "integer", "exclusiveMinimum": 5, "maximum": 8}
    table = {"enum": [{"exclusiveMinimum": 5}, {"maximum": 5.5}], "type": "object"}

    assert with_exact_bounds(schema) is schema
    assert with_exact_bounds(table) == table
    assert [text for text in ("5", "6", "8", "9") if accepts(schema, text)] == ["6", "8"]
