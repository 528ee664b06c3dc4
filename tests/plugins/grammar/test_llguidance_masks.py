"""Masks of a whole step: at once in threads, the same bits as one after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance")

from quire.interfaces.grammar import (
    GrammarKind,
    GrammarMatcher,
    GrammarSource,
    GrammarStuck,
    GrammarVocabulary,
)
from quire_grammar.llguidance import engine, tokens
from quire_grammar.llguidance.engine import LLGuidanceEngine

LETTERS = [bytes([i]) for i in range(256)]
REGEXES = ("[a-c]{3}", "x+", "(ab|cd)*", "[0-9]{1,4}", "q")


def made(vocab_size: int = 257) -> LLGuidanceEngine:
    return LLGuidanceEngine(
        GrammarVocabulary(
            tokens=[*LETTERS, b""],
            special_token_ids=frozenset({256}),
            eos_token_ids=(256,),
            vocab_size=vocab_size,
            encode=lambda text: list(text.encode()),
        )
    )


@pytest.fixture(scope="module")
def matchers() -> list[GrammarMatcher]:
    own = made()
    sources = [GrammarSource(kind=GrammarKind.REGEX, text=text) for text in REGEXES]
    return [own.compile(source).start() for source in sources]


def masks_of(matchers: list[GrammarMatcher]) -> tuple[np.ndarray, list[Any]]:
    masks = np.full((len(matchers), 9), 7, np.int32)
    return masks, type(matchers[0]).fill_masks(matchers, masks)


def test_masks_in_threads_are_those_of_each(
    matchers: list[GrammarMatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_num_threads", lambda: 3)
    each = np.zeros((len(matchers), 9), np.int32)
    for matcher, mask in zip(matchers, each, strict=True):
        matcher.fill_mask(mask)

    masks, raised = masks_of(matchers)

    assert np.array_equal(masks, each)
    assert raised == [None] * len(matchers)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_matcher_that_is_stuck_raises_alone(
    matchers: list[GrammarMatcher], monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    monkeypatch.setattr(engine, "_num_threads", lambda: num_threads)
    with pytest.raises(GrammarStuck):
        matchers[4].accept(ord("z"))

    masks, raised = masks_of(matchers)

    assert [isinstance(error, GrammarStuck) for error in raised] == [False] * 4 + [True]
    assert masks[1, ord("x") // 32] == 1 << (ord("x") % 32)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_many_matchers_go_on_at_once_and_say_who_cannot(
    monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    monkeypatch.setattr(engine, "_num_threads", lambda: num_threads)
    compiled = made().compile(GrammarSource(kind=GrammarKind.REGEX, text="[a-c]{3}"))
    many = [compiled.start() for _ in range(40)]

    raised = type(many[0]).accept_each(many, [ord("abcz"[i % 4]) for i in range(40)])

    assert [isinstance(error, GrammarStuck) for error in raised] == [i % 4 == 3 for i in range(40)]
    masks, raised = masks_of(many[:3])
    assert raised == [None] * 3
    assert (masks == masks[0]).all()


def test_tokens_that_the_tokenizer_does_not_know_never_come() -> None:
    """A model's vocabulary is often padded beyond the tokenizer's."""
    wide = made(vocab_size=1000)
    matcher = wide.compile(GrammarSource(kind=GrammarKind.REGEX, text="(?s:.)*")).start()
    mask = np.full(32, 7, np.int32)

    matcher.fill_mask(mask)

    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).max() == 256


@pytest.mark.parametrize("few_tokens", [0, 1000])
def test_what_is_compiled_for_a_check_has_the_same_masks(
    monkeypatch: pytest.MonkeyPatch, few_tokens: int
) -> None:
    monkeypatch.setattr(tokens, "FEW_TOKENS", few_tokens)
    own = made()
    text = '{"properties": {"a": {"type": "string", "maxLength": 40}}, "required": ["a"]}'
    source = GrammarSource(kind=GrammarKind.JSON_SCHEMA, text=text)
    whole, for_check = own.compile(source).start(), own.compile_for_check(source).start()
    masks = np.zeros((2, 9), np.int32)

    for token_id in b'{"a": "text", "b":[1]}':
        whole.fill_mask(masks[0])
        for_check.fill_mask(masks[1])
        assert np.array_equal(*masks)
        whole.accept(token_id)
        for_check.accept(token_id)
