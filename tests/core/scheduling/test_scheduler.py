"""What a step computes and for whom, when nothing goes wrong."""

from __future__ import annotations

import pytest
from builders import make_harness

from quire.errors import RequestError
from quire.request import FinishReason


def test_request_gets_its_tokens_one_a_step() -> None:
    harness = make_harness()
    harness.add("r", [1, 2, 3], max_tokens=2)

    first = harness.step(token=8)
    output = harness.schedule()
    (update,) = harness.collect(output, token=9)

    assert first.num_scheduled_tokens == {0: 3}
    assert output.num_scheduled_tokens == {0: 1}
    assert (update.token_ids, update.finish_reason) == ((9,), FinishReason.LENGTH)
    assert not harness.scheduler.has_unfinished()
    assert harness.scheduler.schedule() is None


def test_added_sequence_tells_the_runner_all_it_needs() -> None:
    harness = make_harness(block_size=2)
    harness.add("r", [5, 6, 7], max_tokens=4, stop_token_ids=frozenset([3]))

    (added,) = harness.schedule().added

    assert (added.request_id, added.index, added.row) == ("r", 0, 0)
    assert (added.token_ids, added.num_prompt_tokens) == ([5, 6, 7], 3)
    assert (added.num_computed_tokens, added.block_tables) == (0, [[1, 2]])
    assert added.stop_token_ids == frozenset([3])


def test_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    harness = make_harness(max_num_batched_tokens=4)
    harness.add("r", range(10))

    outputs = [harness.step() for _ in range(3)]

    assert [output.num_tokens for output in outputs] == [4, 4, 2]
    assert [output.samples for output in outputs] == [set(), set(), {0}]


def test_chunk_leaves_a_token_for_each_running_sequence_after_it() -> None:
    harness = make_harness(max_num_batched_tokens=6, scheduling_policy="priority")
    harness.add("small", [1], priority=5)
    harness.step()
    harness.add("long", range(20), priority=0)

    output = harness.step()
    output = harness.step()

    assert output.num_scheduled_tokens == {0: 1, 1: 5}


def test_single_tokens_come_first_in_the_batch() -> None:
    harness = make_harness()
    harness.add("first", [1, 2, 3])
    harness.step()
    harness.add("second", [4, 5, 6])
    harness.add("third", [7])

    output = harness.schedule()

    assert list(output.num_scheduled_tokens.items()) == [(0, 1), (2, 1), (1, 3)]


def test_rows_are_bounded_and_used_again() -> None:
    harness = make_harness(max_num_seqs=2)
    for name in ("a", "b", "c"):
        harness.add(name, [1, 2], max_tokens=1)

    first, second = harness.step(), harness.step()

    assert [added.row for added in first.added] == [0, 1]
    assert second.finished == [0, 1]
    assert [added.request_id for added in second.added] == ["c"]


def test_step_in_flight_counts_as_computed() -> None:
    harness = make_harness()
    harness.add("r", [1, 2, 3])

    first, second = harness.schedule(), harness.schedule()

    assert second.num_scheduled_tokens == {0: 1}
    assert harness.scheduler.num_steps_in_flight == 2
    assert harness.collect(first, token=5)[0].token_ids == (5,)
    assert harness.collect(second, token=6)[0].token_ids == (6,)


def test_nothing_is_scheduled_past_max_tokens() -> None:
    harness = make_harness()
    harness.add("r", [1, 2, 3], max_tokens=2)
    harness.schedule()
    harness.schedule()

    assert harness.scheduler.schedule() is None


def test_sequence_ends_at_the_model_length() -> None:
    harness = make_harness(max_model_len=5)
    harness.add("r", [1, 2, 3], max_tokens=50)
    harness.step()

    (update,) = harness.collect(harness.schedule())

    assert update.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("token", "stop_reason"), [(3, 3), (4, None)], ids=["the user's stop token", "end token"]
)
def test_stop_token_ends_the_sequence(token: int, stop_reason: int | None) -> None:
    harness = make_harness()
    stops = {"stop_token_ids": frozenset([3, 4]), "eos_token_ids": frozenset([4])}
    harness.add("r", [1, 2], **stops)

    (update,) = harness.collect(harness.schedule(), token=token)

    assert (update.finish_reason, update.stop_reason) == (FinishReason.STOP, stop_reason)
    assert update.token_ids == (token,)


def test_token_dispatched_after_the_stop_token_is_discarded() -> None:
    harness = make_harness()
    harness.add("r", [1, 2], stop_token_ids=frozenset([3]))
    first, second = harness.schedule(), harness.schedule()

    harness.collect(first, token=3)

    assert harness.collect(second, token=5) == []
    assert harness.manager.usage == 0


def test_stop_token_is_passed_over_before_min_tokens() -> None:
    harness = make_harness()
    harness.add("r", [1, 2], stop_token_ids=frozenset([3]), min_tokens=2)

    updates = [harness.collect(harness.schedule(), token=3)[0] for _ in range(2)]

    assert [update.finish_reason for update in updates] == [None, FinishReason.STOP]


def test_failed_row_ends_its_sequence_alone() -> None:
    harness = make_harness()
    harness.add("bad", [1, 2])
    harness.add("good", [3, 4])

    bad, good = harness.collect(harness.schedule(), errors={0: "not a number"})

    assert (bad.finish_reason, bad.error) == (FinishReason.ERROR, "not a number")
    assert (good.token_ids, good.finish_reason) == ((7,), None)


def test_failed_chunk_ends_its_sequence() -> None:
    harness = make_harness(max_num_batched_tokens=2)
    harness.add("bad", [1, 2, 3])

    (update,) = harness.collect(harness.schedule(), errors={0: "not a number"})

    assert update.finish_reason is FinishReason.ERROR
    assert not harness.scheduler.has_unfinished()


def test_failed_row_is_not_cached() -> None:
    harness = make_harness(block_size=2)
    harness.add("bad", [1, 2, 3])
    harness.collect(harness.schedule(), errors={0: "not a number"})

    harness.add("next", [1, 2, 3])

    assert harness.schedule().added[0].num_computed_tokens == 0


def test_update_tells_how_much_of_the_prompt_was_cached() -> None:
    harness = make_harness(block_size=2)
    harness.add("first", [1, 2, 3, 4, 5])
    harness.step()
    harness.add("second", [1, 2, 3, 4, 6])

    updates = harness.collect(harness.schedule())

    assert [update.num_cached_tokens for update in updates] == [0, 4]


def test_fork_is_no_cache_hit() -> None:
    harness = make_harness(block_size=2)
    harness.add("r", [1, 2, 3, 4, 5], n=2)
    harness.step()

    updates = harness.collect(harness.schedule())

    assert [update.num_cached_tokens for update in updates] == [0, 0]


def test_siblings_fork_once_the_prompt_is_dispatched() -> None:
    harness = make_harness(block_size=4)
    harness.add("r", [1, 2, 3, 4, 5, 6], n=3)

    first, second = harness.schedule(), harness.schedule()

    assert list(first.num_scheduled_tokens) == [0]
    assert [added.num_computed_tokens for added in second.added] == [5, 5]
    assert [added.block_tables for added in second.added] == [[[1, 3]], [[1, 4]]]
    assert second.block_copies == [(0, 2, 3), (0, 2, 4)]
    assert second.samples == {0, 1, 2}


def test_fork_at_a_block_boundary_needs_no_copy() -> None:
    harness = make_harness(block_size=2)
    harness.add("r", [1, 2, 3], n=2)
    harness.step()

    output = harness.schedule()

    assert output.block_copies == []
    assert output.added[0].block_tables == [[1, 3]]


def test_siblings_that_wait_to_fork_do_not_block_the_queue() -> None:
    harness = make_harness()
    harness.add("family", [1, 2, 3], n=3)
    harness.add("other", [4, 5])

    assert [added.request_id for added in harness.schedule().added] == ["family", "other"]
    assert harness.scheduler.num_waiting == 2


def test_siblings_are_served_before_later_requests() -> None:
    harness = make_harness(max_num_seqs=2)
    harness.add("family", [1, 2, 3], n=2)
    harness.add("other", [4, 5], max_tokens=1)
    harness.add("last", [6])
    harness.step()

    (added,) = harness.schedule().added

    assert (added.request_id, added.index) == ("family", 1)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "parameter"),
    [
        pytest.param([], 1, "prompt", id="empty"),
        pytest.param([0] * 64, 1, "prompt", id="longer than the context"),
        pytest.param([0] * 30, 11, "max_tokens", id="more than all blocks"),
    ],
)
def test_request_that_can_never_fit_is_refused(
    prompt: list[int], max_tokens: int, parameter: str
) -> None:
    harness = make_harness(num_usable=10, block_size=4)

    with pytest.raises(RequestError) as refusal:
        harness.add("r", prompt, max_tokens=max_tokens)

    assert refusal.value.parameter == parameter
    assert not harness.scheduler.has_unfinished()


def test_request_that_just_fits_is_served() -> None:
    harness = make_harness(num_usable=10, block_size=4, max_model_len=40)

    harness.add("r", [0] * 39, max_tokens=50)

    assert harness.schedule().num_tokens == 39


def test_request_id_in_use_is_refused() -> None:
    harness = make_harness()
    harness.add("r", [1])

    with pytest.raises(RequestError, match="in use"):
        harness.add("r", [2])
