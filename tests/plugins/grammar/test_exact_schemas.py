"""What a library would check more loosely is rewritten, so that it is not, or refused by name."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

import pytest
from byte_vocabulary import END, byte_vocabulary

pytest.importorskip("llguidance")
from quire.constraints import GrammarKind, GrammarSource
from quire.interfaces.grammar import GrammarEngine, GrammarStuck
from quire_grammar.llguidance.engine import LLGuidanceEngine
from quire_grammar.llguidance.formats import FORMATS
from quire_grammar.llguidance.regexes import exact_pattern, other_than
from quire_grammar.llguidance.schemas import exact_schema

WHOLE = {"type": "integer"}
LISTED = {"type": "object", "properties": {"a": WHOLE}, "required": ["a"]}


@pytest.fixture(scope="module")
def llguidance() -> LLGuidanceEngine:
    return LLGuidanceEngine(byte_vocabulary())


def accepted(engine: GrammarEngine, kind: str, form: Any, *texts: str) -> list[str]:
    text = json.dumps(form) if kind == "json" else form
    grammar = engine.compile(GrammarSource(kind=GrammarKind(kind), text=text))
    return [one for one in texts if has(grammar, one)]


def has(grammar: Any, text: str) -> bool:
    matcher = grammar.start()
    try:
        for token in [*text.encode(), END]:
            matcher.accept(token)
    except GrammarStuck:
        return False
    return bool(matcher.is_terminated())


@pytest.mark.parametrize("rest", [{}, {"additionalProperties": {"type": "string"}}])
def test_a_listed_name_with_escapes_is_that_name(engine: GrammarEngine, rest: Any) -> None:
    written = ['{"a":1}', '{"a":1,"\\u0061":"x"}', '{"\\u0061":"x"}']

    assert accepted(engine, "json", LISTED | rest, *written) == ['{"a":1}']


@pytest.mark.parametrize("rest", [{}, {"additionalProperties": {"type": "string"}}])
def test_further_names_stay_free(llguidance: LLGuidanceEngine, rest: Any) -> None:
    further = '{"a":1,"":"x","ab":"y","\\n":"z"}'

    assert accepted(llguidance, "json", LISTED | rest, further, '{"a":1,"a":"x"}') == [further]


def test_other_names_are_all_but_those() -> None:
    names = ["", "a", "ab", "b\n", "ac"]
    pattern = re.compile(re.sub(r"\\x{(\w+)}", lambda m: chr(int(m[1], 16)), other_than(names)))

    others = ["aa", "abc", "b", "b\nb", "\n", "c"]
    assert [one for one in [*names, *others] if pattern.fullmatch(one)] == others


def test_names_beside_patterns_with_a_prefix_are_free(llguidance: LLGuidanceEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"a": WHOLE, "x-a": {"type": ["integer", "boolean"]}},
        "patternProperties": {"^x-": {"type": ["boolean", "null"]}},
        "additionalProperties": {"type": "string"},
    }
    kept = ['{"a":1,"x-a":true,"x-":null,"x":"b"}', '{"xx-":"","a-":""}']
    wrong = ['{"x-b":"b"}', '{"x-a":1}', '{"x-a":null}', '{"a":"b"}', '{"\\u0078-":""}', '{"b":1}']

    assert accepted(llguidance, "json", schema, *kept, *wrong) == kept


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"^\S$", "é٣-"),
        (r"^\W$", "\ufeff\x1c\u00a0-"),
        (r"^\D$", "é\ufeff\x1c\u00a0-"),
        (r"^[\S]$", "é٣-"),
        (r"^[^\s]$", "é٣-"),
        (r"^[^\w]$", "\ufeff\x1c\u00a0-"),
        (r"^[^\d]$", "é\ufeff\x1c\u00a0-"),
    ],
)
def test_classes_have_what_every_dialect_has(
    llguidance: LLGuidanceEngine, pattern: str, allowed: str
) -> None:
    texts = [json.dumps(one, ensure_ascii=False) for one in "é٣\ufeff\x1c\u00a0-"]
    schema = {"type": "string", "pattern": pattern}

    assert "".join(map(json.loads, accepted(llguidance, "json", schema, *texts))) == allowed


def test_classes_of_a_regex_have_what_python_has(llguidance: LLGuidanceEngine) -> None:
    marks = "é\u0301\u00b2\x1c"
    found = {
        regex: "".join(accepted(llguidance, "regex", regex, *marks))
        for regex in (r"\w", r"\W", r"\S", r"[^\w]")
    }

    assert found == {r"\w": "é", r"\W": "\x1c", r"\S": "é\u0301\u00b2", r"[^\w]": "\x1c"}


@pytest.mark.parametrize("pattern", [r"^\\S[\]\w][]\s]$", r"\d[^a]\w", "^[a-c]{1,4}$"])
def test_patterns_without_such_classes_stay_as_they_are(pattern: str) -> None:
    assert exact_pattern(pattern) == pattern


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"const": 2**53 + 1}, "const"),
        ({"const": -(2**63)}, "const"),
        ({"properties": {"const": {"enum": [{"a": [1e19]}]}}}, "enum"),
        ({"type": "integer", "minimum": 2**53 + 1}, "minimum"),
        ({"type": "integer", "exclusiveMaximum": 2**54}, "exclusiveMaximum"),
        ({"properties": {"default": {"minProperties": 2, "required": ["a", "a"]}}}, "minProp"),
        ({"allOf": [{"minProperties": 2, "required": ["a"]}]}, "minProperties"),
        ({"patternProperties": {"a$": WHOLE}}, "patternProperties"),
        ({"properties": {"a" * 257: {}}, "additionalProperties": WHOLE}, "properties"),
        ({"pattern": "a\\"}, "backslash"),
        (False, "false"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_would_be_loosened_is_refused_by_its_keyword(schema: Any, keyword: str) -> None:
    with pytest.raises(ValueError, match=keyword):
        exact_schema(schema)


def test_a_number_of_many_digits_is_not_shown_whole() -> None:
    with pytest.raises(ValueError, match="'const' with a number beyond") as caught:
        exact_schema({"const": 10**4000})

    assert len(str(caught.value)) < 120


def test_a_pattern_and_a_format_beside_what_is_no_list_name_it(
    llguidance: LLGuidanceEngine,
) -> None:
    schema = {"type": "string", "format": "date", "pattern": "a", "allOf": 5}

    with pytest.raises(ValueError, match="allOf"):
        llguidance.compile(GrammarSource(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "required": ["a", "b"], "minProperties": 2},
        {"type": "object", "minProperties": 1, "properties": {}},
        {"enum": [2**53, {"const": -1.5}], "default": {"const": 2**60}},
        {"type": "integer", "minimum": -(2**53), "maximum": 2**63 - 1},
        {"properties": {"$ref": WHOLE, "pattern": WHOLE}, "additionalProperties": False},
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_is_kept_stays_as_it_is(schema: Any) -> None:
    assert exact_schema(schema) is schema


def test_references_with_other_characters_are_followed(llguidance: LLGuidanceEngine) -> None:
    schema = {"$ref": "#/$defs/größe 1", "$defs": {"größe 1": WHOLE}}

    assert accepted(llguidance, "json", schema, "1", '"a"') == ["1"]
    assert accepted(llguidance, "json", True, "1", '"a"') == ["1", '"a"']


def test_dates_are_those_of_the_calendar() -> None:
    pattern = re.compile(FORMATS["date"])
    days = [f"2023-{month:02}-{day:02}" for month in range(14) for day in range(33)]
    ends_of_february = [f"{year:04}-02-{day}" for year in range(10_000) for day in (28, 29, 30)]

    wrong = [
        text for text in (*days, *ends_of_february) if bool(pattern.match(text)) != is_date(text)
    ]
    assert wrong == []


def is_date(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


@pytest.mark.parametrize("also", [{}, {"pattern": "29"}, {"pattern": "29", "allOf": [{}]}])
def test_formats_of_time_are_kept(llguidance: LLGuidanceEngine, also: Any) -> None:
    written = {
        "date": ['"2024-02-29"', '"2023-02-29"', '"0000-01-29"'],
        "time": ['"12:29:00.5+01:00"', '"12:29:60Z"', '"12:29:00"'],
        "date-time": ['"2024-02-29T12:00:00Z"', '"2023-02-29T12:00:00Z"'],
    }
    for form, texts in written.items():
        schema = {"type": "string", "format": form, **also}

        assert accepted(llguidance, "json", schema, *texts) == texts[:1]
