"""What the sampler is told of each row is what the request asked for."""

from __future__ import annotations

import pytest
import torch
from naive_batch import NaiveSequence, added
from toy_model import VOCAB

from quire.execution.batch_builder import BuiltBatch
from quire.execution.sampling_rows import SamplingRows
from quire.interfaces.sampling import SamplingBatch
from quire.request import SamplingParams

CPU = torch.device("cpu")


def make_rows(*sequences: tuple[int, SamplingParams], **other: object) -> SamplingRows:
    rows = SamplingRows(8, VOCAB, CPU)
    for row, params in sequences:
        put(rows, row, params, **other)
    return rows


def put(rows: SamplingRows, row: int, params: SamplingParams, **other: object) -> None:
    sequence = NaiveSequence(
        sequence_id=row, token_ids=[1, 2, 3], num_prompt_tokens=3, row=row, tables=[[1]]
    )
    rows.add(added(sequence, params=params, **other))


def batch_of(rows: SamplingRows, sampled: list[int], positions: list[int]) -> SamplingBatch:
    import numpy as np

    built = BuiltBatch(
        batch=None,  # type: ignore[arg-type]
        sampled_ids=sampled,
        sampled_rows=sampled,
        sampled_positions=np.array(positions, np.int32),
    )
    return rows.batch(built)


def test_parameters_follow_the_order_of_the_step_not_of_the_rows() -> None:
    rows = make_rows(
        (1, SamplingParams(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125)),
        (4, SamplingParams(temperature=0.0)),
        (6, SamplingParams(temperature=2.0, seed=9)),
    )

    batch = batch_of(rows, [6, 1, 4], [8, 3, 5])

    assert batch.temperature.tolist() == [2.0, 0.5, 0.0]
    assert batch.top_k.tolist() == [VOCAB, 3, VOCAB]
    assert batch.top_p.tolist() == [1.0, 0.25, 1.0]
    assert batch.min_p.tolist() == [0.0, 0.125, 0.0]
    assert batch.rows.tolist() == [6, 1, 4]
    assert batch.position.tolist() == [8, 3, 5]


def test_tensors_have_the_dtypes_of_the_contract() -> None:
    batch = batch_of(make_rows((0, SamplingParams())), [0], [3])

    for names, dtype in (
        (("temperature", "top_p", "min_p"), torch.float32),
        (("top_k", "seed", "child_index", "position"), torch.int64),
        (("rows",), torch.int32),
    ):
        for name in names:
            assert getattr(batch, name).dtype is dtype, name


@pytest.mark.parametrize(
    ("params", "flags"),
    [
        (SamplingParams(temperature=0), {"all_greedy", "any_greedy"}),
        (SamplingParams(temperature=1e-6, top_p=0.5), {"all_greedy", "any_greedy"}),
        (SamplingParams(), set()),
        (SamplingParams(top_k=5), {"any_top_k"}),
        (SamplingParams(top_k=-1), set()),
        (SamplingParams(top_k=VOCAB), set()),
        (SamplingParams(top_k=2**40), set()),
        (SamplingParams(top_p=0.9), {"any_top_p"}),
        (SamplingParams(min_p=0.1), {"any_min_p"}),
    ],
)
def test_flags_say_what_no_row_asks_for(params: SamplingParams, flags: set[str]) -> None:
    batch = batch_of(make_rows((0, params)), [0], [3])

    names = ("all_greedy", "any_greedy", "any_top_k", "any_top_p", "any_min_p")
    assert {name for name in names if getattr(batch, name)} == flags


def test_flags_cover_only_the_rows_of_the_step() -> None:
    rows = make_rows((0, SamplingParams(temperature=0)), (1, SamplingParams(top_k=2)))

    assert batch_of(rows, [0], [3]).all_greedy
    mixed = batch_of(rows, [0, 1], [3, 3])
    assert not mixed.all_greedy
    assert mixed.any_greedy
    assert mixed.any_top_k
    assert not batch_of(rows, [1], [3]).any_greedy


def test_row_that_changes_hands_takes_the_new_parameters() -> None:
    rows = make_rows((0, SamplingParams(temperature=0.5, min_tokens=2, max_tokens=9)))
    batch_of(rows, [0], [3])

    put(rows, 0, SamplingParams(temperature=3.0), index=2, seed=5)
    batch = batch_of(rows, [0], [3])

    assert batch.temperature.tolist() == [3.0]
    assert batch.child_index.tolist() == [2]
    assert batch.seed.tolist() == [5]
    assert batch.suppressed is None


@pytest.mark.parametrize(
    ("seed", "bits"), [(0, 0), (-1, -1), (2**64 - 1, -1), (2**63, -(2**63)), (2**63 - 1, 2**63 - 1)]
)
def test_seed_keeps_its_64_bits(seed: int, bits: int) -> None:
    batch = batch_of(make_rows((0, SamplingParams()), seed=seed), [0], [3])

    assert batch.seed.tolist() == [bits]


def test_stop_tokens_are_suppressed_until_min_tokens() -> None:
    # A prompt of 3: position 3 holds the first token, so min_tokens=2 frees position 5.
    rows = make_rows((2, SamplingParams(min_tokens=2)), stop_token_ids=frozenset({7, 4}))
    put(rows, 5, SamplingParams())

    pairs = [batch_of(rows, [5, 2], [p, p]).suppressed for p in (3, 4, 5)]

    for early in pairs[:2]:
        assert early is not None
        assert [t.tolist() for t in early] == [[1, 1], [4, 7]]
    assert pairs[2] is None


def test_min_tokens_without_stop_tokens_suppresses_nothing() -> None:
    rows = make_rows((0, SamplingParams(min_tokens=5)))

    assert batch_of(rows, [0], [3]).suppressed is None


def test_positions_of_a_step_of_draws_are_the_new_ones_each_time() -> None:
    rows = make_rows((0, SamplingParams()))

    assert [batch_of(rows, [0], [p]).position.tolist() for p in (3, 4, 5)] == [[3], [4], [5]]
