"""A text that arrives in pieces is cut at the same place as one that is there at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.text.stop_strings import StopChecker

FEW = settings(max_examples=50, deadline=None)
letters = st.text(st.sampled_from("aab🙂"), max_size=30)
stop_lists = st.lists(
    st.text(st.sampled_from("aab🙂"), min_size=1, max_size=5), min_size=1, max_size=4
)
cuts = st.lists(st.integers(0, 30), max_size=12)


def find_first(text: str, stops: Sequence[str], min_end: int = 0) -> tuple[int, str] | None:
    """Return start and stop string of the match that must win."""
    found = [
        (start, order)
        for order, stop in enumerate(stops)
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > min_end
    ]
    start, order = min(found, default=(-1, 0))
    return None if start < 0 else (start, stops[order])


def cut_into(text: str, cuts: Sequence[int]) -> list[str]:
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


def push_all(
    checker: StopChecker, chunks: Sequence[str], num_unsearched: int = 0
) -> tuple[list[str], str | None]:
    given = [
        checker.push(chunk, search=index >= num_unsearched) for index, chunk in enumerate(chunks)
    ]
    given.append(checker.push("", finished=True))
    return [text for text, _ in given], next((stop for _, stop in given if stop), None)


@FEW
@given(text=letters, stops=stop_lists, cuts=cuts, include=st.booleans())
def test_emitted_text_is_the_text_up_to_the_first_stop_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    checker = StopChecker(stops, include)

    texts, found = push_all(checker, cut_into(text, cuts))

    expected = find_first(text, stops)
    if expected is None:
        assert ("".join(texts), found, checker.end) == (text, None, None)
    else:
        start, stop = expected
        end = start + len(stop)
        assert "".join(texts) == text[: end if include else start]
        assert (found, checker.end) == (stop, end)


@FEW
@given(text=letters, stops=stop_lists, cuts=cuts)
def test_nothing_emitted_can_be_a_part_of_a_later_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    checker = StopChecker(stops)
    shown = ""
    for chunk in cut_into(text, cuts):
        shown += checker.push(chunk)[0]
        rest = text[len(shown) :]
        expected = find_first(text, stops)
        assert text.startswith(shown)
        assert expected is None or len(shown) <= expected[0], (shown, rest)


@FEW
@given(text=letters, stops=stop_lists, cuts=cuts, num_unsearched=st.integers(0, 4))
def test_a_stop_string_counts_only_if_it_ends_in_searched_text(
    text: str, stops: list[str], cuts: list[int], num_unsearched: int
) -> None:
    chunks = cut_into(text, cuts)
    min_end = sum(map(len, chunks[:num_unsearched]))

    texts, found = push_all(StopChecker(stops), chunks, num_unsearched)

    expected = find_first(text, stops, min_end)
    assert found == (expected[1] if expected else None)
    assert "".join(texts) == (text[: expected[0]] if expected else text)


@FEW
@given(text=letters, stops=stop_lists)
def test_what_is_held_back_is_shorter_than_the_longest_stop(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    shown, found = checker.push(text)
    # Twice: a completed stop may wait for one that began earlier.
    assert found or len(text) - len(shown) < 2 * max(map(len, stops))


@pytest.mark.parametrize(
    ("chunks", "stops", "shown"),
    [
        (["Hello wor", "ld"], ["world"], ["Hello ", ""]),
        (["a", "b", "c"], ["abd"], ["", "", "abc"]),
        (["one\n", "\ntwo"], ["\n\n"], ["one", ""]),
        (["xaab"], ["aab", "b"], ["x"]),
        (["ab", "x"], ["abc", "b"], ["", "a"]),
        (["🙂🙂", "👍"], ["🙂👍"], ["🙂", ""]),
    ],
)
def test_text_is_given_as_soon_as_it_is_certain(
    chunks: list[str], stops: list[str], shown: list[str]
) -> None:
    checker = StopChecker(stops)

    assert [checker.push(chunk)[0] for chunk in chunks] == shown


def test_text_after_a_stop_is_dropped() -> None:
    checker = StopChecker(["."])

    assert checker.push("One. Two.") == ("One", ".")
    assert checker.push(" Three.", finished=True) == ("", None)


def test_the_order_of_the_list_decides_between_stops_with_one_start() -> None:
    assert StopChecker(["ab", "abc"]).push("abc") == ("", "ab")
    assert StopChecker(["abc", "ab"]).push("abc") == ("", "abc")


def test_long_repetitive_stops_cost_linear_time() -> None:
    checker = StopChecker([("a" * 1023 + chr(98 + i)) for i in range(16)])

    shown = [checker.push("a" * 10)[0] for _ in range(400)]

    assert len("".join(shown)) == 4000 - 1023
