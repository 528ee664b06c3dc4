"""Blocks are given, shared, copied and taken back; what the state machine finds, in plain cases."""

from __future__ import annotations

import pytest
from builders import make_group, make_manager, make_sequence

from quire.errors import ConfigError
from quire.scheduling.block_manager import BlockManager
from quire.scheduling.output import KVCacheGroup
from quire.scheduling.sequence import Sequence


def run(manager: BlockManager, sequence: Sequence) -> Sequence:
    """Admit a sequence, compute all its tokens and collect the step."""
    assert manager.admit(sequence)
    sequence.num_computed_tokens = sequence.num_tokens
    manager.commit(sequence, sequence.num_computed_tokens)
    return sequence


def leave(manager: BlockManager, sequence: Sequence) -> None:
    manager.give_back(manager.detach(sequence))


def test_admission_gives_blocks_for_all_tokens_from_block_one() -> None:
    manager = make_manager((8, 4))
    sequence = make_sequence([0] * 9)

    assert manager.admit(sequence)

    assert sequence.block_tables == [[1, 2, 3]]
    assert manager.num_free_blocks == 5
    assert manager.usage == pytest.approx(3 / 8)


def test_admission_without_room_changes_nothing() -> None:
    manager = make_manager((8, 4), (2, 4))
    sequence = make_sequence([0] * 9)

    assert not manager.admit(sequence)

    assert sequence.block_tables == []
    assert [pool.num_free for pool in manager.pools] == [8, 2]


def test_admission_leaves_headroom_free() -> None:
    manager = make_manager((3, 4))

    assert not manager.admit(make_sequence([0] * 8), headroom=2)
    assert manager.admit(make_sequence([0] * 8), headroom=1)


def test_admission_is_tried_again_once_blocks_are_free() -> None:
    manager = make_manager((3, 4))
    first, second = make_sequence([0] * 8), make_sequence([1] * 8)
    manager.admit(first)

    assert not manager.admit(second)
    leave(manager, first)
    assert manager.admit(second)


def test_admission_is_tried_again_once_the_cache_has_more_of_it() -> None:
    manager = make_manager((5, 4))
    first, second = make_sequence(range(13)), make_sequence(range(13))
    manager.admit(first)
    assert not manager.admit(second)
    first.num_computed_tokens = 13

    manager.commit(first, 13)

    assert manager.admit(second)
    assert second.num_computed_tokens == 12


def test_reservation_within_its_blocks_still_copies_a_shared_one() -> None:
    manager = make_manager((4, 2))
    sequence, other, rest = make_sequence([0] * 6), make_sequence([0] * 2), make_sequence([1])
    manager.admit(sequence)
    sequence.num_computed_tokens = 1
    manager.fork(sequence, other, num_computed_tokens=1)
    manager.admit(rest)

    assert manager.reserve(sequence, 2) is None
    leave(manager, rest)
    reservation = manager.reserve(sequence, 2)

    assert reservation is not None
    assert reservation.copies == [(0, 1, 4)]


@pytest.mark.parametrize(("num_tokens", "fits"), [(12, True), (13, False)])
def test_request_can_ever_fit_within_the_usable_blocks(num_tokens: int, fits: bool) -> None:
    assert make_manager((3, 4), (9, 4)).can_ever_fit(num_tokens) is fits


@pytest.mark.parametrize(
    ("num_tokens", "num_cached"),
    [
        pytest.param(13, 12, id="all full blocks"),
        pytest.param(12, 8, id="never the last token"),
        pytest.param(11, 8, id="only full blocks"),
        pytest.param(3, 0, id="shorter than a block"),
    ],
)
def test_prefix_hit_covers_full_blocks_but_the_last_token(num_tokens: int, num_cached: int) -> None:
    manager = make_manager((20, 4))
    text = list(range(16))
    run(manager, make_sequence(text))
    sequence = make_sequence(text[:num_tokens])

    manager.admit(sequence)

    assert sequence.num_computed_tokens == num_cached


def test_prefix_hit_shares_the_blocks_themselves() -> None:
    manager = make_manager((20, 4))
    first = run(manager, make_sequence(range(9)))
    second = make_sequence(range(9))

    manager.admit(second)

    assert second.block_tables[0][:2] == first.block_tables[0][:2]
    assert second.block_tables[0][2] != first.block_tables[0][2]


def test_block_is_not_found_before_its_step_is_collected() -> None:
    manager = make_manager((20, 4))
    first, second = make_sequence(range(9)), make_sequence(range(9))
    manager.admit(first)
    first.num_computed_tokens = 9

    manager.admit(second)

    assert second.num_computed_tokens == 0


def test_prefix_is_not_found_under_another_salt() -> None:
    manager = make_manager((20, 4))
    run(manager, make_sequence(range(9), salt="one"))
    other = make_sequence(range(9), salt="two")

    manager.admit(other)

    assert other.num_computed_tokens == 0


def test_prefix_hit_is_the_longest_length_that_every_group_has() -> None:
    manager = make_manager((20, 2), (20, 8))
    run(manager, make_sequence(range(13)))
    sequence = make_sequence(range(13))

    manager.admit(sequence)

    assert sequence.num_computed_tokens == 8
    assert [len(table) for table in sequence.block_tables] == [7, 2]


def test_nothing_is_hashed_without_prefix_caching() -> None:
    manager = make_manager((20, 4), caching=False)
    sequence = make_sequence(range(9))

    manager.admit(sequence)

    assert sequence.digests == []
    assert sequence.next_commit_at > 10**9


def test_reservation_adds_blocks_at_the_end() -> None:
    manager = make_manager((8, 4))
    sequence = make_sequence([0] * 4)
    manager.admit(sequence)
    sequence.num_computed_tokens = 4

    reservation = manager.reserve(sequence, 5)

    assert reservation is not None
    assert reservation.new_block_ids == [[2]]
    assert reservation.copies == []
    assert sequence.block_tables == [[1, 2]]


def test_reservation_copies_a_shared_block_before_it_is_written() -> None:
    manager = make_manager((8, 4))
    parent, child = make_sequence([0] * 6), make_sequence([0] * 6)
    manager.admit(parent)
    manager.fork(parent, child, num_computed_tokens=5)

    reservation = manager.reserve(child, 6)

    assert reservation is not None
    assert reservation.copies == [(0, 2, 3)]
    assert child.block_tables == [[1, 3]]
    assert parent.block_tables == [[1, 2]]


def test_last_reader_of_a_block_writes_without_a_copy() -> None:
    manager = make_manager((8, 4))
    parent, child = make_sequence([0] * 6), make_sequence([0] * 6)
    manager.admit(parent)
    parent.num_computed_tokens = 5
    manager.fork(parent, child, num_computed_tokens=5)
    manager.reserve(child, 6)

    reservation = manager.reserve(parent, 6)

    assert reservation is not None
    assert reservation.copies == []


def test_cached_block_is_copied_before_it_is_written() -> None:
    manager = make_manager((8, 4))
    parent, child = run(manager, make_sequence([0] * 8)), make_sequence([0] * 8)
    manager.fork(parent, child, num_computed_tokens=7)
    leave(manager, parent)

    reservation = manager.reserve(child, 8)

    assert reservation is not None
    assert reservation.copies == [(0, 2, 3)]


def test_failed_reservation_changes_nothing() -> None:
    manager = make_manager((8, 4), (2, 4))
    parent, child = make_sequence([0] * 6), make_sequence([0] * 6)
    manager.admit(parent)
    manager.fork(parent, child, num_computed_tokens=5)

    assert manager.reserve(child, 6) is None

    assert child.block_tables == parent.block_tables == [[1, 2], [1, 2]]
    assert [pool.num_free for pool in manager.pools] == [6, 0]


def test_tail_of_a_prompt_is_evicted_before_its_beginning() -> None:
    manager = make_manager((3, 4))
    leave(manager, run(manager, make_sequence(range(12))))
    leave(manager, run(manager, make_sequence([99])))
    sequence = make_sequence([*range(8), 50])

    manager.admit(sequence)

    assert sequence.num_computed_tokens == 8


def test_detached_blocks_stay_in_use_until_given_back() -> None:
    manager = make_manager((8, 4))
    sequence = make_sequence([0] * 8)
    manager.admit(sequence)

    tables = manager.detach(sequence)

    assert manager.num_free_blocks == 6
    manager.give_back(tables)
    assert manager.num_free_blocks == 8


def test_reset_keeps_what_runs_from_being_cached() -> None:
    manager = make_manager((20, 4))
    running = make_sequence(range(9))
    manager.admit(running)

    manager.reset_prefix_cache()
    manager.commit(running, 9)
    after = make_sequence(range(9))
    manager.admit(after)

    assert after.num_computed_tokens == 0


@pytest.mark.parametrize(
    "group", [make_group(0, 4), make_group(4, 3), make_group(4, 0)], ids=["empty", "3", "0"]
)
def test_group_that_cannot_hold_a_block_is_refused(group: KVCacheGroup) -> None:
    with pytest.raises(ConfigError):
        BlockManager([group], enable_prefix_caching=True)
