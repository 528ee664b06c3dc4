"""Masks of a whole step: at once in threads, the same bits as one after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance")
from llguidance import LLExecutor

from quire.interfaces.grammar import (
    GrammarKind,
    GrammarMatcher,
    GrammarSource,
    GrammarStuck,
    GrammarVocabulary,
)
from quire_grammar.llguidance import engine
from quire_grammar.llguidance.engine import LLGuidanceEngine

LETTERS = [bytes([i]) for i in range(256)]
REGEXES = ("[a-c]{3}", "x+", "(ab|cd)*", "[0-9]{1,4}", "q")


@pytest.fixture(scope="module")
def matchers() -> list[GrammarMatcher]:
    vocabulary = GrammarVocabulary(
        tokens=[*LETTERS, b""],
        special_token_ids=frozenset({256}),
        eos_token_ids=(256,),
        vocab_size=257,
        encode=lambda text: list(text.encode()),
    )
    made = LLGuidanceEngine(vocabulary)
    sources = [GrammarSource(kind=GrammarKind.REGEX, text=text) for text in REGEXES]
    return [made.compile(source).start() for source in sources]


def masks_of(matchers: list[GrammarMatcher]) -> tuple[np.ndarray, list[Any]]:
    masks = np.full((len(matchers), 9), 7, np.int32)
    return masks, type(matchers[0]).fill_masks(matchers, masks)


def test_masks_in_threads_are_those_of_each(
    matchers: list[GrammarMatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_threads", lambda: LLExecutor(num_threads=3))
    each = np.zeros((len(matchers), 9), np.int32)
    for matcher, mask in zip(matchers, each, strict=True):
        matcher.fill_mask(mask)

    masks, raised = masks_of(matchers)

    assert np.array_equal(masks, each)
    assert raised == [None] * len(matchers)


@pytest.mark.parametrize("num_threads", [None, 2])
def test_a_matcher_that_is_stuck_raises_alone(
    matchers: list[GrammarMatcher], monkeypatch: pytest.MonkeyPatch, num_threads: int | None
) -> None:
    threads = None if num_threads is None else LLExecutor(num_threads=num_threads)
    monkeypatch.setattr(engine, "_threads", lambda: threads)
    with pytest.raises(GrammarStuck):
        matchers[4].accept(ord("z"))

    masks, raised = masks_of(matchers)

    assert [isinstance(error, GrammarStuck) for error in raised] == [False] * 4 + [True]
    assert masks[1, ord("x") // 32] == 1 << (ord("x") % 32)
