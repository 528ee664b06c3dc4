"""top_n_sigma against a plain computation, the kit, and the distribution that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processor_rows import apply_alone, draws_follow
from torch import Tensor

from quire.testing import LogitsProcessorTests
from quire_sampling.top_n_sigma.processor import TopNSigma


def expected(logits: Tensor, n: float) -> Tensor:
    finite = logits[logits.isfinite()]
    lowest = logits.max() - n * finite.std(correction=0)
    return torch.where(logits < lowest, float("-inf"), logits)


class TestTopNSigma(LogitsProcessorTests):
    processor = TopNSigma
    arguments = (
        {"n": 1.0},
        {"n": 0.5},
        {},
        True,
        {"n": 0},
        {"n": 3},
    )
    bad_arguments = (
        None,
        1.0,
        [],
        {"n": -1},
        {"n": float("nan")},
        {"n": "1"},
        {"m": 1},
        False,
    )

    def expected(self, logits: Any, tokens: Any, num_prompt_tokens: int, arguments: Any) -> Any:
        given = {} if arguments is True else arguments
        return expected(logits, given.get("n", 1.0))


@given(st.floats(0.1, 3), st.floats(0.2, 5))
def test_what_is_kept_does_not_depend_on_the_temperature(n: float, temperature: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2)).double()
    cold = apply_alone(TopNSigma, logits / temperature, [1], {"n": n})

    assert torch.equal(cold.isfinite(), apply_alone(TopNSigma, logits, [1], {"n": n}).isfinite())


def test_tokens_that_are_banned_do_not_widen_it() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, float("-inf")])

    found = apply_alone(TopNSigma, logits, [1], {"n": 1.0})

    assert found.tolist() == [float("-inf"), float("-inf"), 2.0, 3.0, float("-inf")]


@pytest.mark.parametrize("n", [0.0, 1.0, 2.5])
def test_draws_follow_what_is_kept(n: float, logits_of: Callable[[int], Tensor]) -> None:
    logits = logits_of(16)

    left = apply_alone(TopNSigma, logits, [1], {"n": n})

    assert draws_follow(left, expected(logits.double(), n).softmax(0))
