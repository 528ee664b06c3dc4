"""Forms that grammar engines are tried with, and a judge of answers that needs no engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from attrs import frozen
from hypothesis import strategies as st

from quire.interfaces.grammar import GrammarKind, GrammarSource, GrammarVocabulary

NUM_BYTES = 256
END, SECOND_END, SPECIAL = 256, 257, 258
# Tokens of several bytes, as a tokenizer has them: parts of JSON, and texts that overlap.
PARTS = (b'{"', b'": ', b'", "', b"true", b"tr", b"ue", b"ab", b"abc", b"bc", b"12", b" ", b"}]")
PADDING = 45  # ids that are nobody's token


@frozen(kw_only=True)
class GrammarCase:
    """A form and a walk through it. `parts`: the vocabulary has tokens of several bytes."""

    form: Mapping[str, Any]
    seed: int = 0
    parts: bool = False

    @property
    def kind(self) -> str:
        """Which form it is."""
        return next(iter(self.form))

    @property
    def source(self) -> GrammarSource:
        """The form as engines get it."""
        value = self.form[self.kind]
        if self.kind == "json":
            return GrammarSource(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(value))
        if self.kind == "regex":
            return GrammarSource(kind=GrammarKind.REGEX, text=value)
        return GrammarSource(kind=GrammarKind.CHOICE, text=json.dumps(value))

    def __str__(self) -> str:
        words = "bytes and longer tokens" if self.parts else "a token a byte"
        return f"{self.kind} {json.dumps(self.form[self.kind])}; {words}; seed {self.seed}"

    def __hash__(self) -> int:
        return hash((json.dumps(self.form, sort_keys=True), self.seed, self.parts))


def vocabulary(*, parts: bool) -> GrammarVocabulary:
    """Return every byte, two end tokens, a special token, and ids of no token.

    The one without longer tokens comes with the JSON of such a tokenizer.
    """
    tokens = [bytes([i]) for i in range(NUM_BYTES)] + [b"<end>", b"<turn>", b"<tool>"]
    tokens += PARTS if parts else ()
    return GrammarVocabulary(
        tokens=tokens,
        special_token_ids=frozenset({END, SECOND_END, SPECIAL}),
        eos_token_ids=(END, SECOND_END),
        vocab_size=len(tokens) + PADDING,
        encode=_encode_with(PARTS if parts else ()),
        tokenizer_json=None if parts else _tokenizer_json,
    )


def _tokenizer_json() -> str:
    """Return a byte-level tokenizer without merges, as `tokenizer.json` has it.

    Source: GPT-2's characters of bytes: printable ones as they are, others from 256 on.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(NUM_BYTES) if byte not in shown]
    chars = {byte: chr(byte) for byte in shown} | {b: chr(256 + i) for i, b in enumerate(others)}
    special = {"special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    named = ((END, "<end>"), (SECOND_END, "<turn>"), (SPECIAL, "<tool>"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **special, **flags} for i, text in named],
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {chars[byte]: byte for byte in range(NUM_BYTES)},
            "merges": [],
        },
    }
    return json.dumps(tokenizer)


def _encode_with(parts: tuple[bytes, ...]) -> Callable[[str], list[int]]:
    """Return an encoder that takes the longest token first."""
    by_length = sorted(enumerate(parts, SPECIAL + 1), key=lambda pair: -len(pair[1]))

    def encode(text: str) -> list[int]:
        left, found = text.encode(), []
        while left:
            token_id = next((i for i, part in by_length if left.startswith(part)), left[0])
            found.append(token_id)
            left = left[len(parts[token_id - SPECIAL - 1]) if token_id > SPECIAL else 1 :]
        return found

    return encode


# What is drawn


REGEXES = ("[ab]{2,4}", "x+y?", "(ab|cd)*e", "[0-9]{1,3}(\\.[0-9])?", "a|ab|abc", "é[à-ü]?", "")


def _leaves() -> st.SearchStrategy[Any]:
    bound = st.integers(-30, 30)
    return st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.lists(st.sampled_from(["a", "b c", 'q"', "é", 3, None, True]), min_size=1, max_size=3)
        .map(lambda values: {"enum": values})
        .filter(lambda schema: len(set(map(repr, schema["enum"]))) == len(schema["enum"])),
        st.builds(
            lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
            bound,
            st.integers(0, 40),
        ),
        st.builds(
            lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.sampled_from(["^[a-c]{1,3}$", "^(on|off)$"]).map(
            lambda pattern: {"type": "string", "pattern": pattern}
        ),
    )


def _wider(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.lists(st.sampled_from(["a", "b", "c d"]), min_size=1, max_size=2, unique=True)
    return st.one_of(
        st.builds(_object, names, inner, inner, st.booleans()),
        st.builds(
            lambda items, low, more: {
                "type": "array",
                "items": items,
                "minItems": low,
                "maxItems": low + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 1),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts}),
    )


def _object(names: list[str], first: Any, second: Any, all_required: bool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(zip(names, (first, second), strict=False)),
        "required": names if all_required else names[:1],
        "additionalProperties": False,
    }


def cases(*, parts: bool | None = None) -> st.SearchStrategy[GrammarCase]:
    """Draw a form; `parts` None: either vocabulary."""
    schemas = st.recursive(_leaves(), _wider, max_leaves=4)
    forms = st.one_of(
        schemas.map(lambda schema: {"json": schema}),
        st.sampled_from([regex for regex in REGEXES if regex]).map(lambda regex: {"regex": regex}),
        st.lists(st.sampled_from(["a", "ab", "b\n", "é"]), min_size=1, max_size=3, unique=True).map(
            lambda choices: {"choice": choices}
        ),
    )
    return st.builds(
        GrammarCase,
        form=forms,
        seed=st.integers(0, 99),
        parts=st.booleans() if parts is None else st.just(parts),
    )


# Answers are judged


def is_answer(case: GrammarCase, text: bytes) -> bool:
    """Whether a text is of the form."""
    try:
        answer = text.decode()
    except UnicodeDecodeError:
        return False
    value = case.form[case.kind]
    if case.kind == "choice":
        return answer in value
    if case.kind == "regex":
        return re.fullmatch(value, answer) is not None
    try:
        return fulfils(json.loads(answer), value)
    except ValueError:
        return False


def fulfils(value: Any, schema: Any) -> bool:
    """Whether a value fulfils a schema of the keywords that are drawn here."""
    if "anyOf" in schema:
        return any(fulfils(value, part) for part in schema["anyOf"])
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    match schema["type"]:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            is_whole = type(value) is int or (type(value) is float and value.is_integer())
            return is_whole and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and _is_text(value, schema)
        case "array":
            is_list = isinstance(value, list)
            return (
                is_list
                and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(fulfils(item, schema["items"]) for item in value)
            )
    return isinstance(value, dict) and _is_object(value, schema)


def _is_text(value: str, schema: Any) -> bool:
    if "pattern" in schema:
        return re.search(schema["pattern"], value) is not None and not value.endswith("\n")
    return bool(schema["minLength"] <= len(value) <= schema["maxLength"])


def _is_object(value: dict[str, Any], schema: Any) -> bool:
    properties = schema["properties"]
    return all(name in value for name in schema["required"]) and all(
        name in properties and fulfils(item, properties[name]) for name, item in value.items()
    )


# Keywords that an engine enforces or refuses by name


@frozen(kw_only=True)
class Keyword:
    """A keyword of JSON Schema 2020-12, a schema with it, and an answer that it alone forbids."""

    name: str
    schema: Any
    forbidden: str

    def __str__(self) -> str:
        return f"{self.name} in {json.dumps(self.schema)}, which forbids {self.forbidden}"

    def __hash__(self) -> int:
        return hash(str(self))


_NUMBERS = {"type": "array", "items": {"type": "integer"}}
_OPEN = {"type": "object", "additionalProperties": {"type": "integer"}}
KEYWORDS = tuple(
    Keyword(name=name, schema=schema, forbidden=forbidden)
    for name, schema, forbidden in (
        ("uniqueItems", {**_NUMBERS, "uniqueItems": True}, "[1,1]"),
        ("contains", {**_NUMBERS, "contains": {"const": 7}}, "[1]"),
        ("minItems", {**_NUMBERS, "minItems": 2}, "[1]"),
        ("maxItems", {**_NUMBERS, "maxItems": 1}, "[1,2]"),
        ("prefixItems", {"type": "array", "prefixItems": [{"type": "null"}]}, "[1]"),
        ("not", {"type": "integer", "not": {"const": 7}}, "7"),
        ("if", {"type": "integer", "if": {"const": 7}, "then": {"const": 8}}, "7"),
        ("const", {"const": 7}, "8"),
        ("multipleOf", {"type": "integer", "multipleOf": 3}, "7"),
        ("minimum", {"type": "integer", "minimum": 5}, "4"),
        ("exclusiveMaximum", {"type": "integer", "exclusiveMaximum": 5}, "5"),
        ("minLength", {"type": "string", "minLength": 2}, '"a"'),
        ("pattern", {"type": "string", "pattern": "^b+$"}, '"a"'),
        ("format", {"type": "string", "format": "date"}, '"a"'),
        ("minProperties", {**_OPEN, "minProperties": 2}, '{"a":1}'),
        ("maxProperties", {**_OPEN, "maxProperties": 1}, '{"a":1,"b":2}'),
        ("propertyNames", {**_OPEN, "propertyNames": {"pattern": "^b$"}}, '{"a":1}'),
        ("required", {**_OPEN, "properties": {"b": {}}, "required": ["b"]}, '{"a":1}'),
        ("dependentRequired", {**_OPEN, "dependentRequired": {"a": ["b"]}}, '{"a":1}'),
        ("patternProperties", {**_OPEN, "patternProperties": {"^a": {"const": 2}}}, '{"a":1}'),
        ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 5}]}, "7"),
        ("allOf", {"allOf": [{"type": "integer"}, {"minimum": 5}]}, "4"),
    )
)
