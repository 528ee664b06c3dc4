"""Bounds hold, whatever is taken and given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import OverloadedError
from quire.server.admission import Admission


@given(st.lists(st.integers(0, 40)), st.integers(1, 5), st.integers(1, 100))
def test_never_more_than_the_bounds(counts: list[int], requests: int, tokens: int) -> None:
    admission = Admission(max_requests=requests, max_tokens=tokens)
    taken = []
    for count in counts:
        try:
            admission.take_request()
        except OverloadedError:
            assert admission.num_requests == requests
            admission.give_tokens(taken.pop(0))
            admission.give_request()
            continue
        try:
            admission.take_tokens(count)
        except OverloadedError:
            assert admission.num_tokens + count > tokens
            admission.give_request()
        else:
            taken.append(count)
        assert admission.num_requests == len(taken) <= requests
        assert admission.num_tokens == sum(taken) <= max(tokens, max(taken, default=0))


def test_a_prompt_above_the_bound_is_taken_alone() -> None:
    admission = Admission(max_requests=5, max_tokens=10)

    admission.take_tokens(50)

    with pytest.raises(OverloadedError, match="50 tokens are waiting"):
        admission.take_tokens(1)
