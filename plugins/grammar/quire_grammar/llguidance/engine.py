"""Grammars compiled and matched by llguidance (Rust); limits are the library's own."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from quire.interfaces.grammar import (
    CompiledGrammar,
    GrammarEngine,
    GrammarKind,
    GrammarMatcher,
    GrammarSource,
    GrammarStuck,
    GrammarVocabulary,
)
from quire_grammar.llguidance.gbnf import gbnf_to_lark
from quire_grammar.llguidance.lark import without_forcing
from quire_grammar.llguidance.regexes import exact_regex
from quire_grammar.llguidance.schemas import exact_schema
from quire_grammar.llguidance.tags import TagGrammar
from quire_grammar.llguidance.tokens import Tokenizers

# Between JSON's tokens; without an end, a model that likes spaces would never finish.
WHITESPACE = r"[ \n\t]{1,16}"
# Of an object, which JSON's own grammar would let any value be.
ANY_OBJECT = '{"type": "object"}'
JSON_SETTINGS: Any = {"whitespace_pattern": WHITESPACE}
MAX_ERROR_CHARS = 200
# Of this process's processors; what runs beside the masks is the engine's own thread.
SHARE_OF_PROCESSORS, MOST_THREADS = 0.75, 16
FEW = 16  # matchers that go on in less time than threads take to begin


class LLGuidanceEngine(GrammarEngine):
    """Compile with llguidance."""

    compiles_in_threads = True

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._tokenizers = Tokenizers(vocabulary)
        self._special = _texts(vocabulary, vocabulary.special_token_ids)
        self._ends = _texts(vocabulary, vocabulary.eos_token_ids)

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Compile a grammar and look at its first tokens."""
        return self._compiled(source, is_for_check=False)

    def compile_for_check(self, source: GrammarSource) -> CompiledGrammar:
        """Compile with fewer slices of the vocabulary, which are a fifth of a schema's time."""
        return self._compiled(source, is_for_check=True)

    def _compiled(self, source: GrammarSource, *, is_for_check: bool) -> CompiledGrammar:
        grammar = self._to_grammar(source)
        tokenizer, asks_python = self._tokenizers.take(grammar, is_for_check=is_for_check)
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        probe = matcher.deep_copy()
        if not probe.is_error():
            probe.compute_bitmask()
        if probe.is_error():
            raise ValueError(_reason(probe))
        return _Compiled(matcher, asks_python)

    def _to_grammar(self, source: GrammarSource) -> str:
        """Return the source in the library's own form. Raises: ValueError."""
        if source.kind is GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(exact_regex(source.text))
        if source.kind is GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(without_forcing(source.text))
        if source.kind is GrammarKind.GBNF:
            return LLMatcher.grammar_from_lark(without_forcing(gbnf_to_lark(source.text)))
        if source.kind is GrammarKind.CHOICE:
            choices = " | ".join(json.dumps(text) for text in source.choices)
            return LLMatcher.grammar_from_lark(f"start: {choices}")
        if source.kind is GrammarKind.STRUCTURAL_TAG:
            tags = TagGrammar(self._special, self._ends, JSON_SETTINGS)
            return tags.whole(source.tree)
        if source.kind not in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT):
            raise ValueError(f"llguidance does not read {source.kind}")
        text = source.text if source.kind is GrammarKind.JSON_SCHEMA else ANY_OBJECT
        schema = json.loads(text)
        exact = exact_schema(schema)
        text = text if exact is schema else json.dumps(exact)
        return LLMatcher.grammar_from_json_schema(text, overrides=JSON_SETTINGS)


@functools.cache
def _num_threads() -> int:
    """Return how many threads serve a step: most of this process's processors."""
    count = int(len(os.sched_getaffinity(0)) * SHARE_OF_PROCESSORS)
    return min(max(count, 1), MOST_THREADS)


@functools.cache
def _threads(count: int) -> LLExecutor:
    return LLExecutor(num_threads=count)


class _Compiled(CompiledGrammar):
    def __init__(self, matcher: LLMatcher, asks_python: bool) -> None:
        self._matcher = matcher
        self._asks_python = asks_python

    def start(self) -> GrammarMatcher:
        return _Matcher(self._matcher.deep_copy(), self._asks_python)


class _Matcher(GrammarMatcher):
    def __init__(self, matcher: LLMatcher, asks_python: bool) -> None:
        self._matcher = matcher
        self._asks_python = asks_python

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        self._ask_python()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()

    @classmethod
    def fill_masks(
        cls, matchers: Sequence[GrammarMatcher], masks: NDArray[np.int32]
    ) -> list[Exception | None]:
        """Fill them in one call, in as many threads as there are processors for them.

        One thread too: on one processor a call a row gave 1 ms of a step of 64 to changes between
        it and the engine's.
        """
        known = [matcher for matcher in matchers if isinstance(matcher, _Matcher)]
        own = [matcher._matcher for matcher in known]
        if len(own) < 2 or not masks.flags.c_contiguous:
            return super().fill_masks(matchers, masks)
        for matcher in known:
            matcher._ask_python()
        places = list(zip(own, range(len(own)), strict=True))
        threads = _threads(_num_threads())
        threads.unsafe_compute_mask_ptr(places, masks.ctypes.data, masks.strides[0], len(masks))
        return [GrammarStuck(_reason(one)) if one.is_error() else None for one in own]

    @classmethod
    def accept_each(
        cls, matchers: Sequence[GrammarMatcher], token_ids: Sequence[int]
    ) -> list[Exception | None]:
        """Go on in several threads, where there are processors for them."""
        own = [matcher._matcher for matcher in matchers if isinstance(matcher, _Matcher)]
        count = _num_threads()
        if count == 1 or len(own) < FEW:
            went = [
                one.consume_token(token_id) for one, token_id in zip(own, token_ids, strict=True)
            ]
        else:
            went = _threads(count).consume_token_par(list(zip(own, token_ids, strict=True)))
        return [
            None if has_gone else GrammarStuck(_reason(one))
            for one, has_gone in zip(own, went, strict=True)
        ]

    def _ask_python(self) -> None:
        """Find the tokens of a text that has to come, which the matcher keeps for its mask.

        Threads that asked Python for them would wait for one another, longer than masks take.
        """
        if self._asks_python:
            self._matcher.compute_ff_tokens()

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    def is_terminated(self) -> bool:
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarStuck(_reason(self._matcher))


def _texts(vocabulary: GrammarVocabulary, token_ids: Iterable[int]) -> dict[str, int]:
    """Return tokens' texts with their ids."""
    tokens = vocabulary.tokens
    known = [i for i in token_ids if i < len(tokens) and tokens[i]]
    return {tokens[i].decode(errors="replace"): i for i in sorted(known)}


def _reason(matcher: LLMatcher) -> str:
    """Return the first line of the library's error, which tells its state after it."""
    text = matcher.get_error().partition("\n<state>")[0]
    if text.startswith("NoExtension"):
        return "nothing can match it"
    line = " ".join(text.split())
    return line if len(line) <= MAX_ERROR_CHARS else line[: MAX_ERROR_CHARS - 3] + "..."
