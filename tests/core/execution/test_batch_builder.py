"""Every batch equals one that is worked out token by token, whatever happened before it."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_batch import (
    NaiveScheduler,
    NaiveSequence,
    added,
    expected_batch,
    found_batch,
    make_groups,
)

from quire.execution.batch_builder import BatchBuilder
from quire.interfaces.attention import BatchLimits
from quire.scheduling.output import SchedulerOutput

LIMITS = BatchLimits(
    max_num_seqs=5, max_num_batched_tokens=200, max_model_len=40, max_steps_in_flight=2
)
CPU = torch.device("cpu")
BLOCK_SIZES = st.lists(st.sampled_from([1, 2, 4, 16, 64]), min_size=1, max_size=3)
SEEDS = st.integers(0, 2**32)


def make_builder(block_sizes: list[int], limits: BatchLimits = LIMITS) -> BatchBuilder:
    return BatchBuilder(make_groups(block_sizes), limits, CPU)


def one_sequence(length: int, *, row: int = 0, computed: int = 0) -> NaiveSequence:
    return NaiveSequence(
        sequence_id=7,
        token_ids=list(range(10, 10 + length)),
        num_prompt_tokens=length,
        num_computed=computed,
        row=row,
        tables=[[3, 1, 4]],
    )


@settings(max_examples=150, deadline=None)
@given(SEEDS, BLOCK_SIZES)
def test_batches_equal_the_naive_ones_over_a_random_life(seed: int, block_sizes: list[int]) -> None:
    scheduler = NaiveScheduler(random=random.Random(seed), block_sizes=block_sizes, limits=LIMITS)
    builder = make_builder(block_sizes)
    kept = []

    for _ in range(12):
        output = scheduler.step()
        want = expected_batch(scheduler, output)
        builder.apply_difference(output)
        built = builder.build(output)
        kept.append((built, want))
        scheduler.finish_step(output, builder)

    # All at the end: a batch in flight must not change when later ones are built.
    for built, want in kept:
        assert found_batch(built) == want


@settings(max_examples=50, deadline=None)
@given(SEEDS, BLOCK_SIZES)
def test_block_tables_hold_each_sequences_blocks_as_far_as_they_are_read(
    seed: int, block_sizes: list[int]
) -> None:
    scheduler = NaiveScheduler(random=random.Random(seed), block_sizes=block_sizes, limits=LIMITS)
    builder = make_builder(block_sizes)

    for _ in range(6):
        output = scheduler.step()
        builder.apply_difference(output)
        batch = builder.build(output).batch
        by_row = {s.row: s for s in scheduler.running}
        for i, size in enumerate(block_sizes):
            table = batch.groups[i].block_table
            assert table.shape == (len(batch.query_lens), -(-max(batch.seq_lens_bound) // size))
            for row, seq_len, blocks in zip(
                batch.rows.tolist(), batch.seq_lens_bound, table.tolist(), strict=True
            ):
                num_blocks = -(-seq_len // size)
                assert blocks[:num_blocks] == by_row[row].tables[i][:num_blocks]
        scheduler.finish_step(output, builder)


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_host_side_counts_agree_with_the_device(seed: int) -> None:
    scheduler = NaiveScheduler(random=random.Random(seed), block_sizes=[4], limits=LIMITS)
    builder = make_builder([4])

    for _ in range(5):
        output = scheduler.step()
        builder.apply_difference(output)
        batch = builder.build(output).batch
        assert batch.seq_lens_bound == batch.seq_lens.tolist()
        assert batch.num_seqs == batch.padded_to == len(output.num_scheduled_tokens)
        singles = batch.query_lens[: batch.num_single_token_seqs]
        assert singles == [1] * batch.query_lens.count(1)
        assert 0 <= batch.in_flight_slot <= LIMITS.max_steps_in_flight
        scheduler.finish_step(output, builder)


def test_steps_in_flight_use_different_staging_buffers() -> None:
    builder = make_builder([4])
    sequence = one_sequence(12)
    output = SchedulerOutput(step_id=1, added=[added(sequence)], num_scheduled_tokens={7: 1})
    builder.apply_difference(output)

    slots = [
        builder.build(SchedulerOutput(step_id=n, num_scheduled_tokens={7: 1})).batch.in_flight_slot
        for n in range(1, 4)
    ]

    assert len(set(slots)) == 3


@pytest.mark.parametrize("num_known", [3, 5])
def test_only_the_token_that_the_host_lacks_is_read_from_the_device(num_known: int) -> None:
    builder = make_builder([4])
    sequence = one_sequence(num_known)
    first = SchedulerOutput(
        step_id=1,
        added=[added(sequence)],
        num_scheduled_tokens={7: num_known},
        samples={7},
    )
    builder.apply_difference(first)
    builder.last_tokens[:] = torch.tensor([77, 66, 66, 66, 66, 66])

    prompt = builder.build(first).batch
    later = SchedulerOutput(step_id=2, num_scheduled_tokens={7: 1}, samples={7})
    decoded = builder.build(later).batch

    assert prompt.token_ids.tolist() == sequence.token_ids
    assert decoded.token_ids.tolist() == [77]


def test_step_that_samples_nothing_has_no_logit_rows() -> None:
    builder = make_builder([4])
    output = SchedulerOutput(step_id=1, added=[added(one_sequence(9))], num_scheduled_tokens={7: 4})
    builder.apply_difference(output)

    built = builder.build(output)

    assert built.batch.logit_rows.tolist() == built.sampled_ids == built.sampled_rows == []
    assert built.batch.logit_rows.dtype is torch.int32


def test_reused_row_forgets_the_sequence_before_it() -> None:
    builder = make_builder([4])
    old = one_sequence(12)
    new = NaiveSequence(sequence_id=8, token_ids=[5, 6], num_prompt_tokens=2, row=0, tables=[[9]])
    first = SchedulerOutput(step_id=1, added=[added(old)], num_scheduled_tokens={7: 12})
    builder.apply_difference(first)
    builder.build(first)
    builder.last_tokens[0] = 99

    second = SchedulerOutput(
        step_id=2, finished=[7], added=[added(new)], num_scheduled_tokens={8: 2}
    )
    builder.apply_difference(second)
    batch = builder.build(second).batch

    assert builder.row_of == {8: 0}
    assert batch.token_ids.tolist() == [5, 6]
    assert batch.positions.tolist() == [0, 1]
    assert batch.groups[0].slot_mapping.tolist() == [36, 37]


def test_sequence_of_the_greatest_length_fits_in_its_table() -> None:
    limits = BatchLimits(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=9)
    builder = make_builder([4], limits)
    output = SchedulerOutput(step_id=1, added=[added(one_sequence(9))], num_scheduled_tokens={7: 9})
    builder.apply_difference(output)

    batch = builder.build(output).batch

    assert batch.groups[0].block_table.tolist() == [[3, 1, 4]]
    assert batch.groups[0].slot_mapping.tolist() == [12, 13, 14, 15, 4, 5, 6, 7, 16]
