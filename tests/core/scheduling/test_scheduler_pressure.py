"""Who gives way when blocks run out, who is served first, and what ends early."""

from __future__ import annotations

import pytest
from builders import Harness, make_harness
from invariants import check_nothing_is_left

from quire.request import FinishReason


def fill(harness: Harness, *names: str, max_tokens: int = 8) -> None:
    """Queue requests with prompts of their own, one block each of four tokens."""
    for number, name in enumerate(names):
        harness.add(name, [10 + number] * 4, max_tokens=max_tokens)


def finish_all(harness: Harness) -> None:
    while harness.scheduler.has_unfinished():
        harness.step()


def test_latest_arrival_is_preempted_when_blocks_run_out() -> None:
    harness = make_harness(num_usable=3, block_size=4)
    fill(harness, "first", "second")
    harness.step()
    output = harness.step()

    assert output.preempted == [1]
    assert output.num_scheduled_tokens == {0: 1}
    assert (harness.scheduler.num_running, harness.scheduler.num_waiting) == (1, 1)
    assert harness.scheduler.num_preemptions == 1


def test_worst_priority_is_preempted_though_it_came_first() -> None:
    harness = make_harness(num_usable=3, block_size=4, scheduling_policy="priority")
    harness.add("worse", [1] * 4, priority=5)
    harness.add("better", [2] * 4, priority=0)
    harness.step()

    output = harness.step()

    assert output.preempted == [0]


def test_preempted_sequence_is_resumed_with_all_its_tokens() -> None:
    harness = make_harness(num_usable=3, block_size=4, caching=False)
    fill(harness, "first", "second", max_tokens=4)
    outputs = [harness.step() for _ in range(5)]

    (resumed,) = outputs[-1].resumed

    assert (resumed.sequence_id, resumed.token_ids) == (1, [11, 11, 11, 11, 7])
    assert outputs[-1].num_scheduled_tokens == {1: 5}


def test_preempted_sequence_goes_before_those_that_never_ran() -> None:
    harness = make_harness(num_usable=3, block_size=4)
    fill(harness, "first", "second", "third", max_tokens=4)
    outputs = [harness.step() for _ in range(5)]

    assert [added.request_id for added in outputs[-1].resumed] == ["second"]
    assert outputs[-1].added == []


def test_resumed_sequence_is_not_preempted_before_it_has_a_token() -> None:
    harness = make_harness(num_usable=8, block_size=4, max_num_batched_tokens=3, caching=False)
    fill(harness, "first", "second")
    harness.step()
    second = harness.scheduler._running.items[-1]
    harness.scheduler._preempt(second)
    harness.step()
    assert second.owes_a_token

    victim = harness.scheduler._running.victim_for(harness.scheduler._running.items[0])

    assert victim.request_id == "first"


def test_blocks_of_a_preempted_sequence_wait_for_the_steps_in_flight() -> None:
    harness = make_harness(num_usable=3, block_size=4)
    fill(harness, "first", "second")
    step = harness.schedule()

    output = harness.schedule()

    assert output.preempted == [1]
    assert harness.manager.num_free_blocks == 0
    harness.collect(step)
    assert harness.manager.num_free_blocks == 1


def test_preempted_sequence_waits_for_its_token_in_flight() -> None:
    harness = make_harness()
    harness.add("r", [1, 2])
    step = harness.schedule()
    harness.scheduler._preempt(harness.scheduler._running.items[0])

    assert harness.scheduler.schedule() is None
    assert harness.collect(step, token=9)[0].token_ids == (9,)
    assert harness.schedule().resumed[0].token_ids == [1, 2, 9]


def test_preempted_sequence_may_end_by_its_token_in_flight() -> None:
    harness = make_harness()
    harness.add("r", [1, 2], stop_token_ids=frozenset([9]))
    step = harness.schedule()
    harness.scheduler._preempt(harness.scheduler._running.items[0])

    (update,) = harness.collect(step, token=9)

    assert update.finish_reason is FinishReason.STOP
    check_nothing_is_left(harness.scheduler)


def test_blocks_that_come_back_soon_spare_a_victim() -> None:
    harness = make_harness(num_usable=3, block_size=4)
    harness.add("first", [1] * 4, max_tokens=3)
    harness.add("second", [2] * 8, max_tokens=1)
    harness.schedule()

    assert harness.scheduler.schedule() is None
    assert harness.scheduler.num_preemptions == 0


def test_head_of_the_queue_is_not_overtaken_by_what_would_fit() -> None:
    harness = make_harness(num_usable=6, block_size=4)
    harness.add("first", [1] * 8)
    harness.add("large", [2] * 20, max_tokens=1)
    harness.add("small", [3])

    assert [added.request_id for added in harness.step().added] == ["first"]
    assert harness.step().added == []


def test_better_priority_is_served_first() -> None:
    harness = make_harness(max_num_seqs=1, scheduling_policy="priority")
    harness.add("later", [1], priority=3)
    harness.add("sooner", [2], priority=-1)

    assert harness.schedule().added[0].request_id == "sooner"


def test_waiting_makes_up_for_a_worse_priority() -> None:
    harness = make_harness(max_num_seqs=1, scheduling_policy="priority", priority_aging_s=2.0)
    harness.add("patient", [1], priority=3)
    harness.now_s = 6.5
    harness.add("newcomer", [2], priority=0)

    assert harness.schedule().added[0].request_id == "patient"


def test_stream_of_better_priorities_starves_nobody() -> None:
    harness = make_harness(max_num_seqs=1, scheduling_policy="priority", priority_aging_s=1.0)
    harness.add("patient", [1], priority=5, max_tokens=1)
    served = []
    for turn in range(20):
        harness.now_s = turn
        harness.add(f"vip{turn}", [2], priority=0, max_tokens=1)
        served.extend(added.request_id for added in harness.step().added)

    assert served.index("patient") == 5


def test_priority_of_any_size_is_ranked() -> None:
    harness = make_harness(scheduling_policy="priority")
    harness.add("last", [1], priority=10**400)
    harness.add("first", [2], priority=-(10**400))

    assert [added.request_id for added in harness.schedule().added] == ["first", "last"]


def test_abort_while_queued_forgets_the_request() -> None:
    harness = make_harness()
    harness.add("r", [1, 2], n=3)

    harness.scheduler.abort("r")

    check_nothing_is_left(harness.scheduler)
    assert harness.scheduler.schedule() is None


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4], ids=["chunk 1", "chunk 2", "fork", "decode"])
def test_abort_in_flight_frees_with_the_step(num_steps: int) -> None:
    harness = make_harness(max_num_batched_tokens=4)
    harness.add("r", range(6), n=2)
    for _ in range(num_steps - 1):
        harness.step()
    step = harness.schedule()

    harness.scheduler.abort("r")

    assert harness.manager.usage > 0
    assert harness.collect(step) == []
    check_nothing_is_left(harness.scheduler)


def test_abort_of_the_first_sequence_lets_its_siblings_compute_the_prompt() -> None:
    harness = make_harness(max_num_batched_tokens=4)
    harness.add("r", range(6), n=2)
    harness.step()

    harness.scheduler.finish_sequence("r", 0, FinishReason.STOP)

    (added,) = harness.schedule().added
    assert (added.index, added.num_computed_tokens) == (1, 4)


def test_abort_of_an_unknown_request_is_no_error() -> None:
    harness = make_harness()

    harness.scheduler.abort("nobody")
    harness.scheduler.finish_sequence("nobody", 0, FinishReason.STOP)

    assert harness.scheduler.schedule() is None


def test_tokens_after_a_stop_string_are_discarded() -> None:
    harness = make_harness()
    harness.add("r", [1, 2])
    first, second = harness.schedule(), harness.schedule()
    harness.collect(first)

    harness.scheduler.finish_sequence("r", 0, FinishReason.STOP)

    assert harness.collect(second) == []
    check_nothing_is_left(harness.scheduler)


def test_row_of_an_ended_sequence_is_announced_before_it_is_used_again() -> None:
    harness = make_harness(max_num_seqs=1)
    harness.add("a", [1], max_tokens=1)
    harness.step()
    harness.add("b", [2])

    output = harness.schedule()

    assert output.finished == [0]
    assert output.added[0].row == 0


def test_everybody_is_served_from_a_pool_for_one() -> None:
    harness = make_harness(num_usable=4, block_size=4)
    fill(harness, *"abcdef", max_tokens=12)

    finish_all(harness)

    check_nothing_is_left(harness.scheduler)
    assert harness.scheduler.num_preemptions > 0
