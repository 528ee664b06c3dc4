"""dry against a plain loop over the tokens, the kit, and the distribution that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processor_rows import apply_alone, draws_follow, state_of
from torch import Tensor

from quire.request import SamplingParams
from quire.testing import LogitsProcessorTests
from quire_sampling.dry.processor import LONGEST_MATCH, Dry


def repeats(tokens: list[int], breakers: set[int]) -> dict[int, int]:
    """Return by token the longest repetition that it would go on with."""
    found: dict[int, int] = {}
    for end in range(len(tokens) - 1):
        follower, length = tokens[end + 1], 0
        while length < min(end + 1, LONGEST_MATCH):
            token_id = tokens[end - length]
            if token_id != tokens[-1 - length] or token_id in breakers:
                break
            length += 1
        if follower not in breakers:
            found[follower] = max(found.get(follower, 0), length)
    return found


def expected(logits: Tensor, tokens: list[int], arguments: Any) -> Tensor:
    given = {} if arguments is True else arguments
    logits, allowed = logits.clone(), given.get("allowed_length", 2)
    tokens = tokens[-given.get("range", 1024) :]
    for token_id, length in repeats(tokens, set(given.get("sequence_breakers", ()))).items():
        if length >= allowed:
            power = given.get("base", 1.75) ** (length - allowed)
            logits[token_id] -= given.get("multiplier", 0.8) * power
    return logits


class TestDry(LogitsProcessorTests):
    processor = Dry
    arguments = (
        {},
        True,
        {"allowed_length": 1, "multiplier": 3},
        {"allowed_length": 1, "base": 1, "sequence_breakers": [0, 2, 10**6]},
        {"allowed_length": 1, "range": 5},
        {"multiplier": 0, "allowed_length": 1},
    )
    bad_arguments = (
        None,
        0.8,
        {"multiplier": -1},
        {"base": 0.5},
        {"base": float("inf")},
        {"allowed_length": 1.5},
        {"range": 0},
        {"range": True},
        {"sequence_breakers": "\n"},
        {"sequence_breakers": ["\n"]},
        {"sequence_breakers": [-1]},
        {"sequence_breakers": [1] * 1025},
        {"penalty": 1},
    )

    def expected(self, logits: Any, tokens: Any, num_prompt_tokens: int, arguments: Any) -> Any:
        return expected(logits, tokens, arguments)


ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "multiplier": st.sampled_from([0.5, 1, 2.0]),
        "base": st.sampled_from([1.0, 1.25, 2]),
        "allowed_length": st.integers(1, 6),
        "range": st.integers(2, 60),
        "sequence_breakers": st.lists(st.integers(0, 4), max_size=2),
    },
)
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40) | st.builds(
    lambda part, times, rest: part * times + rest,
    st.lists(st.integers(0, 4), min_size=1, max_size=9),
    st.integers(1, 15),
    st.lists(st.integers(0, 4), max_size=3),
)


@given(st.lists(st.tuples(TOKENS, st.none() | ARGUMENTS), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_rows_of_all_kinds_are_lowered_as_a_plain_loop_says(rows: list[Any]) -> None:
    processor = Dry(6, 8, "cpu")
    logits = torch.randn(len(rows), 6, generator=torch.Generator().manual_seed(1)).double()
    for row, (_, arguments) in enumerate(rows):
        processor.add_row(row, arguments, SamplingParams())
    want = [
        one if arguments is None else expected(one, tokens, arguments)
        for one, (tokens, arguments) in zip(logits, rows, strict=True)
    ]

    state = state_of(list(range(len(rows))), [tokens for tokens, _ in rows])
    found = processor.apply(logits.clone(), state)

    torch.testing.assert_close(found, torch.stack(want), rtol=1e-12, atol=1e-12)


def test_a_very_long_repetition_leaves_a_finite_logit() -> None:
    logits = torch.zeros(4).half()

    found = apply_alone(Dry, logits, [1, 2] * 60, {"base": 4, "multiplier": 100})

    assert found.isfinite().all()
    assert found.argmin().item() == 1


def test_draws_follow_the_lowered_logits(logits_of: Callable[[int], Tensor]) -> None:
    logits, tokens = logits_of(10), [1, 2, 3, 9, 1, 2, 4, 1, 2]

    left = apply_alone(Dry, logits, tokens, {})

    assert draws_follow(left, expected(logits.double(), tokens, {}).softmax(0))
