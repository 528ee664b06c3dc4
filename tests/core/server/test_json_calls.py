"""Forced calls without a parser of their own: read the same however the text is cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.interfaces.answer_parsing import Piece
from quire.server.answer_parsing import Meaning, collected
from quire.server.json_calls import JsonCallParser

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(["f", "get.it", "g-2"]), st.dictionaries(st.text(), VALUES)),
    min_size=1,
    max_size=3,
)


def read(text: str, cuts: list[int]) -> Meaning:
    parser = JsonCallParser(["f", "get.it", "g-2"])
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces: list[Piece] = []
    for begin, end in pairwise(places):
        pieces += parser.push(text[begin:end])
    return collected(pieces + parser.finish())


@given(CALLS, st.lists(st.integers(0, 10_000), max_size=8), st.sampled_from(["}", "}\n"]))
def test_any_cut_gives_the_same_calls(
    calls: list[tuple[str, Any]], cuts: list[int], end: str
) -> None:
    written = [f'{{"name": "{n}", "arguments": {json.dumps(a)}{end}' for n, a in calls]

    meaning = read(f"[{', '.join(written)}]", cuts)

    assert [(call.name, json.loads(call.arguments)) for call in meaning.calls] == calls
    assert meaning.content == ""


@pytest.mark.parametrize("length", range(1, 62))
def test_an_answer_that_was_cut_never_raises_and_has_no_half_call(length: int) -> None:
    whole = '[{"name": "f", "arguments": {"a": "\\"}"}}, {"name": "f", "arguments": {}}]'

    meaning = read(whole[:length], [length // 2])

    assert [json.loads(call.arguments) for call in meaning.calls] == [{"a": '"}'}] * (length > 39)


@pytest.mark.parametrize(
    "text", ["no call", "[1, 2]", '[{"name": "other", "arguments": {}}]', "[]"]
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert read(text, [3]) == Meaning(content=text)
