"""xgrammar passes over what it cannot enforce: that is refused, the rest is enforced exactly."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny_llama
from byte_vocabulary import END, byte_vocabulary
from numpy.typing import NDArray
from schema_cases import SchemaMaker
from tiny_llama import OPTIONS, has_all_blocks

from quire import LLM, SamplingParams
from quire.constraints import GrammarKind, GrammarSource, StructuredOutputsParams
from quire.interfaces.grammar import CompiledGrammar, GrammarStuck

pytest.importorskip("xgrammar")

from quire_grammar.xgrammar.engine import XGrammarEngine

CLOSING = frozenset(b'"}]')


@pytest.fixture(scope="module")
def engine() -> XGrammarEngine:
    return XGrammarEngine(byte_vocabulary())


def compiled(engine: XGrammarEngine, schema: Any) -> CompiledGrammar:
    return engine.compile(GrammarSource(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema)))


def has(grammar: CompiledGrammar, answer: str) -> bool:
    return takes(grammar, [*answer.encode(), END])


def takes(grammar: CompiledGrammar, tokens: Iterable[int]) -> bool:
    matcher = grammar.start()
    try:
        for token in tokens:
            matcher.accept(token)
    except GrammarStuck:
        return False
    return True


def walk(grammar: CompiledGrammar, seed: int, mask: NDArray[np.int32]) -> str | None:
    """Draw an answer that likes to close what it opened; None where it did not end."""
    draw, matcher, written = random.Random(seed), grammar.start(), b""
    for _ in range(400):
        matcher.fill_mask(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        if END in allowed and (len(allowed) == 1 or draw.random() < 0.5):
            return written.decode(errors="replace")
        closing = [i for i in allowed if i in CLOSING]
        plain = [i for i in allowed if i < 128 and (i > 32 or draw.random() < 0.3)]
        others = plain or [i for i in allowed if i != END]
        token = draw.choice(closing if closing and draw.random() < 0.4 else others)
        matcher.accept(token)
        written += bytes([token])
    return None


SCHEMAS = [
    *({"type": "integer", "minimum": -17, "exclusiveMaximum": 230}, {"type": "number"}),
    *({"type": "string", "minLength": 2, "maxLength": 3}, {"type": "string", "minLength": 130}),
    *({"type": "string", "maxLength": 1000}, {"type": "string", "pattern": "^a.[^b]{2}\\w$"}),
    *({"type": "string", "format": "uuid"}, {"enum": ["é", 'a"b', 1.5, None, {"a": [1]}]}),
    {"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "string"}},
    {"type": "array", "minItems": 2, "maxItems": 3, "items": {"type": "boolean"}},
    {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
    {"properties": {"a": {"const": 1}}, "additionalProperties": {"const": 2}, "type": "object"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}},
    *({"anyOf": [{"type": "null"}, {"type": ["integer", "string"]}]}, {"type": "object"}, True),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda value: json.dumps(value)[:50])
def test_answers_fulfil_the_schema(
    engine: XGrammarEngine, schema: Any, mask: NDArray[np.int32]
) -> None:
    grammar = compiled(engine, schema)
    answers = [text for seed in range(80) if (text := walk(grammar, seed, mask)) is not None]

    assert answers
    for answer in answers:
        jsonschema.validate(json.loads(answer), schema)


def test_answers_of_drawn_schemas_fulfil_them_or_are_refused(
    engine: XGrammarEngine, mask: NDArray[np.int32]
) -> None:
    num_kept = 0
    for seed in range(150):
        schema = SchemaMaker(seed).make()
        try:
            grammar = compiled(engine, schema)
        except ValueError:
            continue
        answers = [text for i in range(4) if (text := walk(grammar, i, mask)) is not None]
        num_kept += bool(answers)
        for answer in answers:
            jsonschema.Draft202012Validator(schema).validate(json.loads(answer))

    assert num_kept > 50


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "allOf"),
        ({"type": "number", "multipleOf": 3}, "multipleOf"),
        ({"type": "number", "minimum": 3}, "minimum"),
        ({"minimum": 3}, "minimum"),
        ({"type": ["integer", "string"], "minLength": 3}, "minLength"),
        ({"type": "string", "pattern": "a", "minLength": 3}, "minLength"),
        ({"type": "string", "format": "date"}, "format"),
        ({"type": "string", "format": "ipv4"}, "format"),
        ({"type": "string", "pattern": "(?=a)b"}, r"\(\?=a"),
        ({"type": "string", "pattern": "a^b"}, "anchor"),
        ({"type": "string", "pattern": "\\bword"}, "escape"),
        ({"type": "string", "pattern": "^\\W$"}, "escape"),
        ({"type": "string", "pattern": '^a"$'}, "JSON escapes"),
        ({"type": "string", "pattern": "^\\n$"}, "JSON escapes"),
        ({"type": "string", "pattern": "^[\\\\]$"}, "no character"),
        ({"type": "string", "pattern": "^[]a]$"}, "without characters"),
        ({"type": "string", "pattern": "^[a"}, "does not end"),
        ({"type": "string", "pattern": "^[z-a]$"}, "range"),
        ({"type": "string", "pattern": "^[^\\w]$"}, "escape"),
        ({"type": []}, "type"),
        ({"type": 5}, "type"),
        ({"type": "string", "pattern": ".{200}"}, "up to 128"),
        ({"type": "string", "maxLength": 10**6}, "maxLength"),
        ({"type": "string", "minLength": 3, "maxLength": 1}, "maxLength"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "object", "patternProperties": {"^a": True}}, "patternProperties"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"type": "object", "required": ["a"]}, "required"),
        ({"type": "object", "properties": {"a": {"contains": {}}}}, "contains"),
        ({"$ref": "http://example.com/schema"}, "example.com"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"not": {}}}}, "not"),
        ({"enum": [1, "a"], "type": "integer"}, "type"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "type"),
        ({"anyOf": []}, "anyOf"),
        (False, "false"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_would_be_loosened_is_refused_by_its_keyword(
    engine: XGrammarEngine, schema: Any, keyword: str
) -> None:
    with pytest.raises(ValueError, match=keyword):
        compiled(engine, schema)


def test_sets_of_a_pattern_are_those_of_the_pattern(engine: XGrammarEngine) -> None:
    patterns = ["[ -~]", "[^a-c]", "[\\x21\\]-]", "\\S", "[\\s\\d]", "[^\\s]", "."]
    texts = [chr(code) for code in (*range(0x80), 0xA0, 0xE9, 0x2028, 0x2003, 0xFFFD, 0x1F600)]
    for pattern in patterns:
        grammar = compiled(engine, {"type": "string", "pattern": f"^{pattern}$"})
        found = {one for one in texts if has(grammar, f'"{one}"')}
        plain = {one for one in texts if ord(one) > 0x1F and one not in '"\\\u2028'}

        assert found & plain == {one for one in plain if re.match(pattern, one)}
        assert all(json.loads(f'"{one}"') == one and re.match(pattern, one) for one in found)


@pytest.mark.parametrize("text", [b"\xed\xb2\xa2", b"\xe0\x9f\xa6", b"\xf0\x8c\xbc\xa3"])
@pytest.mark.parametrize(
    "source",
    [
        GrammarSource(kind=GrammarKind.REGEX, text="[^a]"),
        GrammarSource(kind=GrammarKind.REGEX, text="."),
        GrammarSource(kind=GrammarKind.GBNF, text="root ::= [^a]"),
        GrammarSource(kind=GrammarKind.GBNF, text="root ::= ."),
        GrammarSource(kind=GrammarKind.GBNF, text="root ::= [\\u0000-\\uffff]"),
    ],
    ids=lambda value: str(value)[-24:],
)
def test_characters_are_utf8(engine: XGrammarEngine, source: GrammarSource, text: bytes) -> None:
    grammar = engine.compile(source)

    assert has(grammar, "\ud7ff")
    assert not takes(grammar, text)


def test_a_dot_matches_no_line_end(engine: XGrammarEngine) -> None:
    grammar = engine.compile(GrammarSource(kind=GrammarKind.REGEX, text="a.b"))

    assert [has(grammar, text) for text in ("axb", "a\nb", "aéb")] == [True, False, True]


def test_lark_and_special_tokens_are_refused(engine: XGrammarEngine) -> None:
    lark = StructuredOutputsParams(grammar='start: "a"').source
    text = StructuredOutputsParams(
        structural_tag={"format": {"type": "const_string", "value": "a<end>"}}
    ).source

    with pytest.raises(ValueError, match="write GBNF"):
        engine.compile(lark)
    with pytest.raises(ValueError, match="special token '<end>'"):
        engine.compile(text)


def test_it_limits_answers_of_an_engine_that_asks_for_it(tmp_path: Path) -> None:
    tiny_llama.write_folder(tmp_path, vocab_size=260, eos_token_id=256)
    options = {**OPTIONS, "skip_tokenizer_init": False, "grammar_backend": "xgrammar"}
    llm = LLM(str(tiny_llama.write_tokenizer(tmp_path)), **options)
    forms: list[dict[str, Any]] = [
        {"json": {"enum": ["x", {"a": 1}]}},
        {"regex": "[a-f]{3}"},
        {"choice": ["yes", "no"]},
        {"grammar": 'root ::= "p" root | "q"'},
        {"structural_tag": {"format": {"type": "const_string", "value": "tag"}}},
    ]
    params = [SamplingParams(max_tokens=60, seed=1, structured_outputs=form) for form in forms]

    found = llm.generate(["abc"] * len(forms), params, use_tqdm=False)
    llm.frontend.close()

    texts = [output.outputs[0].text for output in found]
    assert json.loads(texts[0]) in ("x", {"a": 1})
    assert len(texts[1]) == 3
    assert texts[2] in ("yes", "no")
    assert texts[3].strip("p") == "q"
    assert texts[4] == "tag"
    assert has_all_blocks(llm.engine)
