"""Log-probabilities of tokens: float32, ranked from 1, finite, in slices as at once."""

from __future__ import annotations

import pytest
import torch

from quire.execution.batch_builder import PromptRows
from quire.execution.logprobs import LOWEST, score, score_prompt

NAN, INF = float("nan"), float("inf")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_chosen_token_comes_with_its_rank_and_the_best_in_order() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 1.0]])
    logprobs = logits.log_softmax(-1)

    low, high = score(logprobs, ints(2, 0), [3, 1]).entries()

    assert low.logprob == pytest.approx(logprobs[0, 2].item())
    assert (low.rank, low.top_ids) == (3, (1, 3, 2))
    assert low.top_logprobs == pytest.approx(logprobs[0, [1, 3, 2]].tolist())
    assert (high.rank, high.top_ids) == (1, (0,))


def test_none_of_the_best_are_given_to_a_row_that_wants_none() -> None:
    (entry,) = score(torch.zeros(1, 4).log_softmax(-1), ints(3), [0]).entries()

    assert (entry.rank, entry.top_ids, entry.top_logprobs) == (1, (), ())


def test_more_of_the_best_than_there_are_tokens_gives_all_of_them() -> None:
    (entry,) = score(torch.arange(4.0)[None].log_softmax(-1), ints(3), [20]).entries()

    assert entry.top_ids == (3, 2, 1, 0)


@pytest.mark.parametrize("value", [-INF, NAN, -20000.0])
def test_what_cannot_be_written_as_a_number_is_the_lowest_one(value: float) -> None:
    (entry,) = score(torch.tensor([[-0.5, value, -1.0]]), ints(1), [2]).entries()

    assert entry.logprob == LOWEST
    assert all(number >= LOWEST for number in entry.top_logprobs)


@pytest.mark.parametrize("slice_rows", [1, 2, 5, 100])
def test_slices_of_a_prompt_give_what_the_whole_gives(slice_rows: int) -> None:
    hidden = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    head = torch.randn(6, 13, generator=torch.Generator().manual_seed(2))
    places, targets, num_top = [0, 2, 3, 5, 8], [1, 12, 0, 4, 7], [2, 0, 3, 3, 1]
    asked = PromptRows(places=places, target_ids=targets, num_top=num_top, counts={7: 5})
    seen: list[int] = []

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return (rows @ head).bfloat16()

    found = score_prompt(logits_of, hidden, asked, slice_rows=slice_rows).entries()

    logprobs = (hidden[places] @ head).bfloat16().float().log_softmax(-1)
    want = score(logprobs, ints(*targets), num_top).entries()
    assert max(seen) <= slice_rows
    assert [entry.rank for entry in found] == [entry.rank for entry in want]
    assert [entry.logprob for entry in found] == pytest.approx([e.logprob for e in want])
    assert [len(entry.top_ids) for entry in found] == num_top
