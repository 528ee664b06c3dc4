"""Which JSON schemas xgrammar enforces exactly: it passes over keywords that it cannot enforce.

A keyword is allowed where it is known to be enforced, beside those that it is enforced with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quire_grammar.xgrammar.character_sets import without, written
from quire_grammar.xgrammar.regexes import MAX_COUNT, exact_regex

NOTES = frozenset(
    {
        *("$comment", "$defs", "$schema", "default", "definitions", "deprecated", "description"),
        *("examples", "readOnly", "title", "writeOnly"),
    }
)
# Keywords of JSON Schema; others are notes.
KEYWORDS = frozenset(
    {
        *("$anchor", "$dynamicAnchor", "$dynamicRef", "$id", "$ref", "$vocabulary"),
        *("additionalProperties", "allOf", "anyOf", "const", "contains", "contentEncoding"),
        *("contentMediaType", "contentSchema", "dependentRequired", "dependentSchemas", "else"),
        *("enum", "exclusiveMaximum", "exclusiveMinimum", "format", "if", "items", "maxContains"),
        *("maxItems", "maxLength", "maximum", "maxProperties", "minContains", "minItems"),
        *("minLength", "minimum", "minProperties", "multipleOf", "not", "oneOf", "pattern"),
        *("patternProperties", "prefixItems", "properties", "propertyNames", "required", "then"),
        *("type", "unevaluatedItems", "unevaluatedProperties", "uniqueItems"),
    }
)
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
OF_TYPE: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": BOUNDS,
    "number": (),
    "boolean": (),
    "null": (),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
# Any character that a string has without an escape.
ANY = written(without(()), in_json=True)
MAX_LENGTH = MAX_COUNT * MAX_COUNT
FORMATS = ("uuid",)
# Each alone decides what a value may be.
ALONE = ("$ref", "const", "enum", "anyOf", "allOf")


def prepare_schema(schema: Any) -> None:
    """Refuse what xgrammar would check more loosely; write lengths as patterns, in place.

    Raises: ValueError naming the keyword.
    """
    if schema is False:
        raise ValueError("nothing fulfils the schema false")
    if not isinstance(schema, dict):
        return
    used = {name for name in schema if name in KEYWORDS}
    for name in ALONE:
        if name in used:
            _check_alone(schema, name, used)
            break
    else:
        _check_type(schema, used)
    for table in ("$defs", "definitions"):
        for part in _table(schema, table):
            prepare_schema(part)


def _check_alone(schema: Mapping[str, Any], name: str, used: set[str]) -> None:
    others = used - {name}
    if name in ("const", "enum") and others == {"type"}:
        values = [schema[name]] if name == "const" else schema[name]
        _check_values(values, schema["type"])
    elif others:
        raise ValueError(f"keyword {min(others)!r} beside {name!r} is not enforced by xgrammar")
    if name == "$ref" and not str(schema[name]).startswith("#"):
        raise ValueError(f"keyword '$ref' to another document, {str(schema[name])[:60]!r}")
    if name == "allOf" and len(schema[name]) != 1:
        raise ValueError("keyword 'allOf' with several schemas is not enforced by xgrammar")
    if name == "anyOf" and not schema[name]:
        raise ValueError("keyword 'anyOf' has no schemas")
    for part in schema[name] if name in ("anyOf", "allOf") else ():
        prepare_schema(part)


def _check_values(values: Any, kind: Any) -> None:
    kinds = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict}
    for value in values:
        known = kinds.get(kind) if isinstance(kind, str) else None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = isinstance(value, known) if known else kind == "number" and is_number
        if kind == "integer":
            fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits:
            shown = json.dumps(value)[:40]
            raise ValueError(f"keyword 'type' beside 'enum' or 'const' does not fit {shown}")


def _check_type(schema: dict[str, Any], used: set[str]) -> None:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if "type" in schema and not (isinstance(kinds, list) and kinds):
        raise ValueError("keyword 'type' is neither a type nor a list of them")
    rest = used - {"type"}
    if len(kinds) != 1:
        if rest:
            which = "several types" if kinds else "no 'type'"
            raise ValueError(f"keyword {min(rest)!r} with {which} is not enforced by xgrammar")
        return
    wrong = rest - set(OF_TYPE.get(kinds[0], ()))
    if wrong:
        raise ValueError(
            f"keyword {min(wrong)!r} with type {kinds[0]!r} is not enforced by xgrammar"
        )
    if kinds[0] == "string":
        _check_string(schema)
    elif kinds[0] == "array":
        _check_array(schema)
    elif kinds[0] == "object":
        _check_object(schema)


def _check_string(schema: dict[str, Any]) -> None:
    if "pattern" in schema:
        schema["pattern"] = exact_regex(schema["pattern"], in_json=True)
    kind = schema.get("format")
    if kind is not None and kind not in FORMATS:
        raise ValueError(f"keyword 'format': {str(kind)[:40]!r} is not enforced by xgrammar")
    given = [name for name in ("pattern", "format") if name in schema]
    lengths = [name for name in ("minLength", "maxLength") if name in schema]
    if len(given) > 1 or (given and lengths):
        pair = (given + lengths)[:2]
        raise ValueError(f"keyword {pair[1]!r} beside {pair[0]!r} is not enforced by xgrammar")
    if lengths:
        schema["pattern"] = _of_length(schema.pop("minLength", 0), schema.pop("maxLength", None))


def _of_length(least: Any, most: Any) -> str:
    """Return a pattern of a text's length: under xgrammar's own, control characters may come."""
    for name, value in (("minLength", least), ("maxLength", most)):
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not (is_whole and 0 <= value <= MAX_LENGTH) and (name, value) != ("maxLength", None):
            allowed = f"whole numbers from 0 to {MAX_LENGTH}"
            raise ValueError(f"keyword {name!r} is {str(value)[:40]}; allowed: {allowed}")
    if most is not None and most < least:
        raise ValueError("keyword 'maxLength' is below 'minLength'")
    rest = f"{ANY}*" if most is None else _at_most(most - least)
    return f"^{_exactly(least)}{rest}$"


def _exactly(count: int) -> str:
    whole, left = divmod(count, MAX_COUNT)
    return f"(?:{ANY}{{{MAX_COUNT}}}){{{whole}}}{ANY}{{{left}}}"


def _at_most(count: int) -> str:
    whole, left = divmod(count, MAX_COUNT)
    return f"(?:{ANY}{{0,{MAX_COUNT}}}){{0,{whole}}}{ANY}{{0,{left}}}"


def _check_array(schema: Mapping[str, Any]) -> None:
    for part in [schema.get("items", True), *schema.get("prefixItems", ())]:
        if part is False:
            continue
        prepare_schema(part)


def _check_object(schema: dict[str, Any]) -> None:
    properties = schema.get("properties", {})
    missing = [name for name in schema.get("required", ()) if name not in properties]
    if missing:
        shown = str(missing[0])[:40]
        raise ValueError(f"keyword 'required' names {shown!r}, which 'properties' does not")
    for part in _table(schema, "properties"):
        prepare_schema(part)
    if schema.get("additionalProperties") is not False:
        prepare_schema(schema.get("additionalProperties", True))
    if properties:
        # Of the names that xgrammar takes out of others, "\\u0061" is none where "a" is listed.
        schema["additionalProperties"] = False


def _table(schema: Mapping[str, Any], name: str) -> list[Any]:
    found = schema.get(name)
    return list(found.values()) if isinstance(found, Mapping) else []
