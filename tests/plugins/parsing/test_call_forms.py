"""Answers that a parser's form allows are read back as calls that fulfil their schemas."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from attrs import frozen

from quire.constraints import StructuredOutputsParams
from quire.interfaces.answer_parsing import ToolCallParser
from quire.interfaces.grammar import CompiledGrammar, GrammarVocabulary
from quire.request import SamplingParams
from quire.server.answer_forms import with_form
from quire.server.answer_parsing import Meaning, Parsers, meaning_of
from quire.server.json_calls import JsonCallParser
from quire.server.protocol.tool_choice import ToolUse
from quire_grammar.llguidance.engine import LLGuidanceEngine
from quire_parsers.deepseek.parser import DeepSeekParser
from quire_parsers.hermes.parser import HermesParser
from quire_parsers.llama3_json.parser import Llama3JsonParser
from quire_parsers.mistral.parser import MistralParser
from quire_parsers.think.parser import DeepSeekR1Parser, ThinkParser

PARSERS = [HermesParser, MistralParser, DeepSeekParser, Llama3JsonParser, JsonCallParser]
MARKED = [HermesParser, MistralParser, DeepSeekParser, Llama3JsonParser]
MARKS = ["<|python_tag|>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "</think>", "<think>"]
MARKS += [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
]
MARKS += ["<｜tool▁calls▁end｜>"]
END = 256 + len(MARKS)
# Few letters, so that random text ends, and meets what means something.
LETTERS = sorted(set(b'fgab{}[]":,;1 <>/\n\\_tolc') | set(range(256, END + 1)))


@frozen(kw_only=True)
class Function:
    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = True


F = Function(
    name="f",
    parameters={"properties": {"a": {"enum": [1, '"}', "]</tool_call>"]}}, "required": ["a"]},
)
G = Function(name="fg_2", parameters={"type": "object", "properties": {}})
ANY = Function(name="any", parameters={"type": "object"}, strict=False)
BY_NAME = {"f": F, "fg_2": G}


def engine(special: range) -> LLGuidanceEngine:
    """Return an engine of bytes and marks; those in `special` are special tokens."""
    tokens = [bytes([i]) for i in range(256)] + [mark.encode() for mark in MARKS] + [b"<end>"]
    return LLGuidanceEngine(
        GrammarVocabulary(
            tokens=tokens,
            special_token_ids=frozenset([*special, END]),
            eos_token_ids=(END,),
            vocab_size=END + 1,
            encode=lambda text: list(text.encode()),
        )
    )


PLAIN, SPECIAL = engine(range(0)), engine(range(256, END))


def grammar_of(
    use: ToolUse, parsers: Parsers, kind: LLGuidanceEngine, *, prompt: str = "", **params: Any
) -> CompiledGrammar:
    made = with_form(SamplingParams(**params), use, parsers, prompt)
    assert made.structured_outputs is not None
    return kind.compile(made.structured_outputs.source)


def walk(grammar: CompiledGrammar, seed: int, *, most: int = 400) -> str | None:
    """Draw an answer of allowed tokens, often marks; None where it did not end."""
    draw, matcher = random.Random(seed), grammar.start()
    mask = np.zeros((END + 32) // 32, np.int32)
    written = b""
    for _ in range(most):
        matcher.fill_mask(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        allowed = [i for i in LETTERS if bits[i]] or np.flatnonzero(bits).tolist()
        weights = [8 if i >= 256 or i == ord("{") else 1 for i in allowed]
        token = draw.choices(allowed, weights)[0]
        if token == END:
            return written.decode(errors="replace")
        matcher.accept(token)
        written += bytes([token]) if token < 256 else MARKS[token - 256].encode()
    return None


def check_calls(meaning: Meaning) -> None:
    for call in meaning.calls:
        value = json.loads(call.arguments)
        if call.name == "any":
            assert isinstance(value, dict)
        else:
            jsonschema.validate(value, BY_NAME[call.name].parameters or {})


@pytest.mark.parametrize("kind", [PLAIN, SPECIAL], ids=["plain", "special"])
@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("is_one_call", [False, True])
def test_forced_answers_are_calls_and_nothing_else(
    parser: type[ToolCallParser], kind: LLGuidanceEngine, is_one_call: bool
) -> None:
    use = ToolUse(functions=(F, G), is_forced=True, is_one_call=is_one_call)
    parsers = Parsers(tool_call=parser, tool_names=use.names)
    grammar = grammar_of(use, parsers, kind)
    counts = set()
    for seed in range(30):
        text = walk(grammar, seed)
        if text is not None:
            meaning = meaning_of(parsers, "", text, ())
            check_calls(meaning)
            assert meaning.content == ""
            counts.add(len(meaning.calls))

    assert min(counts) == 1
    assert (max(counts) > 1) != is_one_call


@pytest.mark.parametrize("kind", [PLAIN, SPECIAL], ids=["plain", "special"])
@pytest.mark.parametrize("parser", MARKED)
def test_every_call_within_text_fulfils_a_strict_schema(
    parser: type[ToolCallParser], kind: LLGuidanceEngine
) -> None:
    use = ToolUse(functions=(F, G, ANY))
    parsers = Parsers(tool_call=parser, tool_names=use.names)
    grammar = grammar_of(use, parsers, kind)
    num_calls, num_texts = 0, 0
    for seed in range(150):
        text = walk(grammar, seed)
        if text is not None:
            meaning = meaning_of(parsers, "", text, ())
            check_calls(meaning)
            num_calls += len(meaning.calls)
            num_texts += bool(meaning.content)

    assert num_calls > 10
    assert num_texts > 10


@pytest.mark.parametrize(
    ("reasoning", "prompt", "opened"),
    [
        (ThinkParser, "<think>\n", ""),
        (ThinkParser, "", "<think>"),
        (DeepSeekR1Parser, "", ""),
    ],
)
def test_thoughts_come_before_forced_calls(reasoning: Any, prompt: str, opened: str) -> None:
    use = ToolUse(functions=(F,), is_forced=True, is_one_call=True)
    parsers = Parsers(tool_call=HermesParser, tool_names=use.names, reasoning=reasoning)
    matcher = grammar_of(use, parsers, PLAIN, prompt=prompt).start()
    text = opened + 'a <tool_call> b</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a":1}}\n'

    for byte in (text + "</tool_call>").encode():
        matcher.accept(byte)

    assert matcher.is_terminated()
    meaning = meaning_of(parsers, prompt, text + "</tool_call>", ())
    assert (meaning.reasoning, meaning.content) == ("a <tool_call> b", "")
    assert [call.arguments for call in meaning.calls] == ['{"a":1}']


def test_after_thoughts_that_a_prompt_has_ended_comes_the_call() -> None:
    use = ToolUse(functions=(F,), is_forced=True)
    parsers = Parsers(tool_call=HermesParser, tool_names=use.names, reasoning=ThinkParser)
    text = walk(grammar_of(use, parsers, PLAIN, prompt="<think>\n\n</think>\n\n"), 0)

    assert text is not None
    assert text.startswith("<tool_call>\n{")


def test_an_answer_is_a_call_or_has_the_form_that_was_asked_for() -> None:
    form = StructuredOutputsParams(json={"const": [1]}, asked_as="response_format")
    use = ToolUse(functions=(F, G))
    parsers = Parsers(tool_call=HermesParser, tool_names=use.names)
    grammar = grammar_of(use, parsers, PLAIN, structured_outputs=form)
    found = [walk(grammar, seed) for seed in range(40)]

    meanings = [meaning_of(parsers, "", text, ()) for text in found if text is not None]

    for meaning in meanings:
        check_calls(meaning)
    assert any(meaning.calls for meaning in meanings)
    assert {json.dumps(json.loads(m.content)) for m in meanings if m.content} == {"[1]"}
    assert all(bool(meaning.calls) != bool(meaning.content) for meaning in meanings)
