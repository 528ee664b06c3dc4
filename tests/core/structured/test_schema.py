"""Old keywords and schemas without a finite answer are refused, others are not."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from schema_cases import SchemaMaker

from quire.structured.schema import check_schema


def requiring(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": {"$ref": f"#/$defs/{name}"}}, "required": ["x"]}


ITSELF: dict[str, Any] = {"$ref": "#"}


@pytest.mark.parametrize("seed", range(50))
def test_schemas_with_finite_answers_pass(seed: int) -> None:
    schema = SchemaMaker(seed).make()
    jsonschema.Draft202012Validator.check_schema(schema)

    check_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": ITSELF}, "required": ["a"]},
        {"type": "array", "minItems": 1, "items": ITSELF},
        {"type": "array", "minItems": 1, "prefixItems": [ITSELF]},
        {"allOf": [ITSELF]},
        {"anyOf": [ITSELF, {"allOf": [ITSELF]}]},
        ITSELF,
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": requiring("c"), "c": requiring("a~1b")}},
    ],
)
def test_schemas_that_require_themselves_are_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match="never end"):
        check_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"anyOf": [requiring("a"), {"type": "null"}], "$defs": {"a": requiring("a")}},
    ],
)
def test_schemas_with_a_part_that_requires_itself_are_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match="a part of it never end"):
        check_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": "object", "properties": {"a": ITSELF}},
        {"type": "array", "items": ITSELF},
        {"type": ["object", "null"], "properties": {"a": ITSELF}, "required": ["a"]},
        {"anyOf": [ITSELF, {"type": "null"}]},
        {"enum": [1], "properties": {"a": ITSELF}, "required": ["a"]},
        {"properties": {"divisibleBy": {"type": "null"}, "dependencies": {"type": "null"}}},
        {"$ref": "#/nowhere"},
        {"$ref": "#name", "$defs": {"a": {"$anchor": "name", "type": "null"}}},
        {"$ref": "#/parts/a", "parts": {"a": {"type": "null"}}},
    ],
)
def test_schemas_with_a_way_out_pass(schema: Any) -> None:
    check_schema(schema)


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"items": [{"type": "null"}]}, "items"),
        ({"additionalItems": False}, "additionalItems"),
        ({"properties": {"a": {"divisibleBy": 2}}}, "divisibleBy"),
        ({"anyOf": [{"dependencies": {"a": ["b"]}}]}, "dependencies"),
        ({"$defs": {"d": {"minimum": 1, "exclusiveMinimum": True}}}, "exclusiveMinimum"),
    ],
)
def test_old_keywords_are_refused_by_name(schema: Any, keyword: str) -> None:
    with pytest.raises(ValueError, match=f"'{keyword}'"):
        check_schema(schema)
