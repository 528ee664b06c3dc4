"""Structural tags are read, refused with a reason, and kept to by the grammar engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quire.constraints import StructuredOutputsParams
from quire.errors import RequestError
from quire.interfaces.grammar import GrammarMatcher, GrammarStuck, GrammarVocabulary
from quire_grammar.llguidance.engine import LLGuidanceEngine

TOOL, END = 256, 257
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
JSON = {"type": "json_schema", "json_schema": SCHEMA | {"additionalProperties": False}}
OLD = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=a>", "schema": JSON["json_schema"], "end": "</f>"},
        {"begin": "<f=b>", "schema": '{"const": 5}', "end": "</f>"},
    ],
    "triggers": ["<f="],
}


def text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def tag(begin: str, content: dict[str, Any], end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def tags(kind: str, *given: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": kind, "tags": list(given), **fields}


def triggered(*given: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return tags("triggered_tags", *given, **{"triggers": ["<"], **fields})


def sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


ANY: dict[str, Any] = {"type": "any_text"}
F = tag("<f>", JSON, "")
G = tag("<g>", text("x"), ["!", "?"])
LISTED = tags("tags_with_separator", F, G, separator=", ", at_least_one=True)


@pytest.fixture(scope="module")
def engine() -> LLGuidanceEngine:
    return LLGuidanceEngine(
        GrammarVocabulary(
            tokens=[*[bytes([i]) for i in range(256)], b"<tool>", b"<end>"],
            special_token_ids=frozenset({TOOL, END}),
            eos_token_ids=(END,),
            vocab_size=258,
            encode=lambda text: list(text.encode()),
        )
    )


def follow(matcher: GrammarMatcher, answer: str) -> None:
    """Write an answer byte by byte, `<tool>` by its token. Raises: GrammarStuck."""
    for position, part in enumerate(answer.split("<tool>")):
        for token in [TOOL] * bool(position) + list(part.encode()):
            matcher.accept(token)


@pytest.mark.parametrize(
    ("given", "whole", "wrong"),
    [
        (OLD, ["", "hello <", 'x<f=a>{"a":1}</f> y <f=b>5</f>'], ["<f=c", "x<f=b>6", "<f=b>5</g"]),
        (triggered(F), ["", 'x<f>{"a":1}y'], ["<x", '<f>{"a":3'], ),
        (triggered(F, at_least_one=True), ['<f>{"a":1} <f>{"a":1}'], ["x", ""]),
        (triggered(F, stop_after_first=True), ["xy", 'xy<f>{"a":1}'], ['<f>{"a":1}x']),
        (triggered(F, excludes=["bad"]), ["ba d"], ["so bad"]),
        (LISTED, ['<f>{"a":1}', '<f>{"a":1}, <g>x?, <g>x!'], ["", "x", "<g>x, "]),
        (tags("tags_with_separator", G, separator=""), ["", "<g>x!<g>x?"], ["<g>x!,"]),
        (tag("", ANY, ["STOP", "HALT"]), ["STOP", "a\nb ST HALT"], ["ab STOPx"]),
        (tag("<tool>", JSON, "<tool>"), ['<tool>{"a":1}<tool>'], ['{"a":1}']),
        (triggered(tag("<tool>", G, ""), triggers=["<tool>"]), ["x <tool><g>x!y"], ["<tool>x"]),
        (sequence({"type": "optional", "content": G}, ANY), ["<g>x!", "free"], []),
        (sequence({"type": "plus", "content": G}, text("é\n\"/")), ["<g>x!<g>x?é\n\"/"], ["é"]),
        ({"type": "or", "elements": [text("yes"), JSON]}, ["yes", '{"a":2}'], ["no", ""]),
        ({"type": "grammar", "grammar": 'start: "a" x\nx: "b" x | "c"'}, ["abbc"], ["ab"]),
        ({"type": "grammar", "grammar": 'root ::= "a" root | "b"'}, ["aab"], ["a"]),
        ({"type": "regex", "pattern": "a/b\\/c[0-9]+"}, ["a/b/c12"], ["a/bc", "a/b/c"]),
        ({"type": "json_schema", "json_schema": True}, ["[1, {}]", "null"], ["nul"]),
        ({**ANY, "excludes": ["<", "é"]}, ["", "abc"], ["a<", "é"]),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_the_engine_keeps_to_tags(
    engine: LLGuidanceEngine, given: Any, whole: list[str], wrong: list[str]
) -> None:
    given = given if "structures" in given else {"type": "structural_tag", "format": given}
    grammar = engine.compile(StructuredOutputsParams(structural_tag=json.dumps(given)).source)

    for answer in whole:
        matcher = grammar.start()
        follow(matcher, answer)
        matcher.accept(END)
    for answer in wrong:
        with pytest.raises(GrammarStuck):  # noqa: PT012
            matcher = grammar.start()
            follow(matcher, answer)
            matcher.accept(END)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "a structural tag that is no JSON"),
        (5, "a structural tag that is no object"),
        ({"type": "json_object", "format": ANY}, "of type 'json_object'; allowed"),
        ({}, "with nothing; allowed: structures and triggers, or format"),
        ({"structures": []}, "with 'structures'; allowed"),
        ({"structures": [], "triggers": ["<"]}, "structures that are no list, or an empty one"),
        ({"structures": [{"begin": "<"}], "triggers": ["<"]}, r"structures\[0\] that is no object"),
        ({"format": "text"}, "a format that is no object; allowed: const_string"),
        ({"format": {"type": "token", "token": 5}}, "of type 'token'; allowed: const_string"),
        ({"format": {**ANY, "max_chars": 5}}, "'max_chars' in a format of type any_text"),
        ({"format": {**JSON, "style": "qwen_xml"}}, "'style' in a format of type json_schema"),
        ({"format": text("")}, "const_string.value that is no text"),
        ({"format": text("x" * 2000)}, "up to 1024 characters"),
        ({"format": tag("<", ANY, [])}, "tag.end that is neither"),
        ({"format": triggered(F, triggers=[])}, "no triggers"),
        ({"format": triggered(F, triggers=["<", "<f"])}, "'<f>', which 2 of the triggers begin"),
        ({"format": triggered(F, triggers=["x"])}, "which 0 of the triggers begin"),
        ({"format": triggered(F, triggers=["<", "x"])}, "the trigger 'x', with which no tag"),
        ({"format": triggered(text("x"))}, "a format of type const_string; allowed: tag"),
        ({"format": triggered(F, at_least_one=1)}, "at_least_one that is 1; allowed: true"),
        ({"format": sequence(ANY, text("x"))}, "any_text that nothing ends"),
        ({"format": sequence(triggered(F), text("x"))}, "triggered_tags that nothing ends"),
        ({"format": {"type": "json_schema", "json_schema": 5}}, "a schema that is neither"),
        ({"format": {"type": "json_schema", "json_schema": "{"}}, "a schema that is no JSON"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_structural_tag_is_refused(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        StructuredOutputsParams(structural_tag=given, asked_as="response_format")

    assert caught.value.parameter == "response_format"


def test_nesting_without_end_is_refused() -> None:
    node: Any = text("x")
    for _ in range(10_000):
        node = {"type": "plus", "content": node}

    with pytest.raises(RequestError, match="deeper than allowed: up to 16 levels"):
        StructuredOutputsParams(structural_tag={"format": node})


def test_a_structural_tag_is_read_again_as_it_was_kept() -> None:
    once = StructuredOutputsParams(structural_tag=OLD)

    assert StructuredOutputsParams(structural_tag=once.structural_tag) == once


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (text("bye<end>"), "'<end>' is an end token"),
        (tag("x", {"type": "json_schema", "json_schema": False}, ""), "schema false"),
        (triggered(tag("a<tool>", G, ""), triggers=["a<tool>"]), "special token '<tool>' beside"),
        (tag("x", {"type": "json_schema", "json_schema": {"x-guidance": {}}}, ""), "x-guidance"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_engine_cannot_write_is_refused(
    engine: LLGuidanceEngine, node: Any, message: str
) -> None:
    source = StructuredOutputsParams(structural_tag={"format": node}).source

    with pytest.raises(ValueError, match=message):
        engine.compile(source)
