"""Mistakes planted on purpose, to know that the proofs can fail. Each one patches a real part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from quire.scheduling import block_manager, footprint, prefix_cache
from quire.scheduling.admission import Admission
from quire.scheduling.block_manager import BlockManager
from quire.scheduling.block_pool import BlockPool, BlockTables
from quire.scheduling.prefix_cache import PrefixCache
from quire.scheduling.prefix_search import PrefixSearch
from quire.scheduling.queues import WaitingQueue
from quire.scheduling.scheduler import PREEMPTED, Scheduler
from quire.scheduling.sequence import Sequence
from quire.scheduling.slab_pool import SlabPool
from quire.scheduling.windows import Windows

Patch = pytest.MonkeyPatch


# In block manager, pool and prefix cache: the machine and the simulation see them


def copy_on_write_is_forgotten(patch: Patch) -> None:
    patch.setattr(BlockPool, "is_writable", lambda self, block_id: True)


def hit_covers_the_last_token(patch: Patch) -> None:
    find = BlockManager._find_prefix

    def find_all(self: BlockManager, sequence: Sequence) -> BlockTables:
        sequence.num_tokens += 1
        try:
            return find(self, sequence)
        finally:
            sequence.num_tokens -= 1

    patch.setattr(BlockManager, "_find_prefix", find_all)


def sharing_is_not_counted(patch: Patch) -> None:
    def share(self: BlockPool, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            if self.num_tables[block_id] == 0:
                self.cache.revive(block_id)
                self.num_tables[block_id] = 1

    patch.setattr(BlockPool, "share", share)


def last_block_is_not_given_back(patch: Patch) -> None:
    give_back = BlockPool.give_back
    patch.setattr(BlockPool, "give_back", lambda self, ids: give_back(self, ids[:-1]))


def eviction_takes_blocks_in_use(patch: Patch) -> None:
    def evict(self: PrefixCache) -> int:
        block_id = next(iter(self._digests))
        self._idle.pop(block_id, None)
        del self._block_ids[self._digests.pop(block_id)]
        return block_id

    patch.setattr(PrefixCache, "evict", evict)


def salt_is_ignored(patch: Patch) -> None:
    patch.setattr(prefix_cache, "salt_digest", lambda salt: b"")


def parent_is_not_hashed(patch: Patch) -> None:
    digest = prefix_cache.block_digest
    patch.setattr(prefix_cache, "block_digest", lambda parent, ids: digest(b"", ids))


def partial_block_is_cached(patch: Patch) -> None:
    commit = BlockManager.commit

    def commit_all(self: BlockManager, sequence: Sequence, num_computed_tokens: int) -> None:
        size = self.groups[0].block_size
        commit(self, sequence, -(-num_computed_tokens // size) * size)

    patch.setattr(BlockManager, "commit", commit_all)


def block_is_cached_when_reserved(patch: Patch) -> None:
    reserve = BlockManager.reserve

    def reserve_and_commit(self: BlockManager, sequence: Sequence, num_tokens: int) -> Any:
        reservation = reserve(self, sequence, num_tokens)
        if reservation is not None and num_tokens >= sequence.next_commit_at:
            self.commit(sequence, num_tokens)
        return reservation

    patch.setattr(BlockManager, "reserve", reserve_and_commit)


def groups_disagree_on_a_hit(patch: Patch) -> None:
    def find(self: PrefixSearch, sequence: Sequence, num_tokens: int) -> BlockTables:
        return [
            self._find_all(sequence, number, num_tokens // group.block_size)
            for number, group in enumerate(self._groups)
        ]

    patch.setattr(PrefixSearch, "find", find)


def second_copy_replaces_the_first(patch: Patch) -> None:
    def add(self: PrefixCache, digest: bytes, block_id: int) -> None:
        self._block_ids[digest] = block_id
        self._digests[block_id] = digest

    patch.setattr(PrefixCache, "add", add)


def failed_reservation_keeps_its_copy(patch: Patch) -> None:
    reserve = BlockManager.reserve

    def copy_first(self: BlockManager, sequence: Sequence, num_tokens: int) -> Any:
        for group, pool in enumerate(self.pools):
            place = sequence.num_computed_tokens // self._block_sizes[group]
            table = sequence.block_tables[group]
            if place < len(table) and not pool.is_writable(table[place]) and pool.num_free:
                self._replace_by_copy(sequence, group, pool.take(1)[0])
        return reserve(self, sequence, num_tokens)

    patch.setattr(BlockManager, "reserve", copy_first)


def reset_forgets_who_is_running(patch: Patch) -> None:
    def reset(self: BlockManager) -> None:
        for pool in self.pools:
            pool.reset_cache()

    patch.setattr(BlockManager, "reset_prefix_cache", reset)


# In the scheduler: the simulation sees them


def block_is_cached_before_its_step_is_collected(patch: Patch) -> None:
    take = Scheduler._take_tokens

    def take_and_commit(self: Scheduler, sequence: Sequence, end: int, step: Any) -> None:
        take(self, sequence, end, step)
        if sequence.next_commit_at <= end <= len(sequence.token_ids):
            self._blocks.commit(sequence, end)

    patch.setattr(Scheduler, "_take_tokens", take_and_commit)


def blocks_do_not_wait_for_steps_in_flight(patch: Patch) -> None:
    stop = Scheduler._stop_running

    def stop_and_free(self: Scheduler, sequence: Sequence) -> None:
        stop(self, sequence)
        for step in self._in_flight:
            while step.releases:
                self._blocks.give_back(step.releases.pop())

    patch.setattr(Scheduler, "_stop_running", stop_and_free)


def sequence_resumes_while_in_flight(patch: Patch) -> None:
    patch.setattr(Scheduler, "_is_in_flight", lambda self, preempted: False)


def token_of_a_preempted_sequence_is_doubled(patch: Patch) -> None:
    update = Scheduler.update

    def update_twice(self: Scheduler, result: Any) -> Any:
        preempted = [s for s in self._waiting._queue if s.status is PREEMPTED]
        updates = update(self, result)
        for sequence in preempted:
            new = result.token_ids.get(sequence.sequence_id, [])
            sequence.token_ids.extend(new)
            sequence.num_tokens += len(new)
        return updates

    patch.setattr(Scheduler, "update", update_twice)


def preempted_sequence_keeps_its_place(patch: Patch) -> None:
    admit = BlockManager.admit

    def admit_and_skip(self: BlockManager, sequence: Sequence, *, headroom: int = 0) -> bool:
        admitted = admit(self, sequence, headroom=headroom)
        if admitted and sequence.status is PREEMPTED:
            sequence.num_computed_tokens = sequence.num_tokens - 1
        return admitted

    patch.setattr(BlockManager, "admit", admit_and_skip)


def fork_does_not_wait_for_the_prompt(patch: Patch) -> None:
    def has_prompt(self: Scheduler, parent: Sequence, step: Any) -> bool:
        return bool(parent.block_tables)

    add_family = WaitingQueue.add_family

    def add_all(self: WaitingQueue, sequences: list[Sequence]) -> None:
        add_family(self, sequences)
        self.release_siblings_of(sequences[0])

    patch.setattr(WaitingQueue, "add_family", add_all)
    patch.setattr(Scheduler, "_has_prompt", has_prompt)


def siblings_wait_for_ever(patch: Patch) -> None:
    release = WaitingQueue.release_siblings_of

    def release_running(self: WaitingQueue, first: Sequence) -> None:
        if first.row is not None:
            release(self, first)

    patch.setattr(WaitingQueue, "release_siblings_of", release_running)


def last_come_is_first_served(patch: Patch) -> None:
    ranks = iter(range(0, -(10**6), -1))
    patch.setattr(Admission, "rank", lambda self, request: next(ranks))


def waiting_does_not_age(patch: Patch) -> None:
    def rank(self: Admission, request: Any) -> int:
        return int(request.priority) if self._policy == "priority" else 0

    patch.setattr(Admission, "rank", rank)


def small_requests_overtake(patch: Patch) -> None:
    def first(self: WaitingQueue) -> Sequence | None:
        return min(self._queue, key=lambda s: (s.num_tokens, s.standing), default=None)

    patch.setattr(WaitingQueue, "first", first)


def resumed_sequence_owes_nothing(patch: Patch) -> None:
    patch.setattr(Sequence, "owes_a_token", False)


def stop_by_length_is_noticed_late(patch: Patch) -> None:
    take = Scheduler._take_tokens

    def take_on(self: Scheduler, sequence: Sequence, end: int, step: Any) -> None:
        take(self, sequence, end, step)
        sequence.steady_until = sequence.num_reserved_tokens

    patch.setattr(Scheduler, "_take_tokens", take_on)


def blocked_head_is_never_tried_again(patch: Patch) -> None:
    def still_misses(self: BlockManager, sequence: Sequence, headroom: int) -> bool:
        return sequence.missing_blocks is not None

    patch.setattr(BlockManager, "_still_misses_blocks", still_misses)


def resumption_wants_more_than_there_is(patch: Patch) -> None:
    admit = BlockManager.admit
    patch.setattr(
        BlockManager,
        "admit",
        lambda self, sequence, headroom=0: admit(
            self, sequence, headroom=headroom + 99 * (sequence.status is PREEMPTED)
        ),
    )


def too_long_requests_are_taken(patch: Patch) -> None:
    patch.setattr(BlockManager, "can_ever_fit", lambda self, num_tokens: True)


def row_is_given_back_twice(patch: Patch) -> None:
    stop = Scheduler._stop_running

    def stop_twice(self: Scheduler, sequence: Sequence) -> None:
        row = sequence.row
        stop(self, sequence)
        if row is not None and sequence.num_tokens > sequence.num_prompt_tokens + 1:
            self._free_rows.append(row)

    patch.setattr(Scheduler, "_stop_running", stop_twice)


def chunk_exceeds_the_budget(patch: Patch) -> None:
    schedule = Scheduler._schedule_one

    def schedule_more(self: Scheduler, sequence: Sequence, step: Any) -> None:
        step.num_spare_tokens += 1
        schedule(self, sequence, step)

    patch.setattr(Scheduler, "_schedule_one", schedule_more)


# In groups with windows and slabs: the machine sees them


def window_is_a_block_short(patch: Patch) -> None:
    first = footprint.first_kept_block

    def later(position: int, window: int, block_size: int) -> int:
        return first(position + block_size, window, block_size)

    patch.setattr(block_manager, "first_kept_block", later)


def steps_in_flight_are_forgotten(patch: Patch) -> None:
    patch.setattr(Windows, "_num_in_flight", lambda self, sequence: 0)


def hit_needs_no_window(patch: Patch) -> None:
    patch.setattr(PrefixSearch, "_served_by_windows", lambda self, sequence, num_tokens: num_tokens)


def parent_far_ahead_is_forked(patch: Patch) -> None:
    patch.setattr(BlockManager, "can_fork", lambda self, parent, num_computed_tokens: True)


def others_slabs_are_not_counted(patch: Patch) -> None:
    missing = SlabPool.slabs_missing

    def most(self: SlabPool, count: int, hits: Iterable[int]) -> int:
        return 0 if self._blocks_per_slab == 1 else missing(self, count, hits)

    patch.setattr(SlabPool, "slabs_missing", most)


def slab_is_given_back_too_early(patch: Patch) -> None:
    aside = SlabPool._lay_aside

    def twice(self: SlabPool, block_id: int) -> None:
        slab = block_id % self._stride
        aside(self, block_id)
        if self._num_in_use.get(slab) == 1:
            self._slabs.free.append(slab)

    patch.setattr(SlabPool, "_lay_aside", twice)


def taken_slab_keeps_its_keys(patch: Patch) -> None:
    patch.setattr(SlabPool, "forget", lambda self, slab: None)


Bug = Callable[[Patch], None]

BLOCK_BUGS: list[Bug] = [
    copy_on_write_is_forgotten,
    hit_covers_the_last_token,
    sharing_is_not_counted,
    last_block_is_not_given_back,
    eviction_takes_blocks_in_use,
    salt_is_ignored,
    parent_is_not_hashed,
    partial_block_is_cached,
    groups_disagree_on_a_hit,
    second_copy_replaces_the_first,
]
MACHINE_BUGS: list[Bug] = [
    block_is_cached_when_reserved,
    failed_reservation_keeps_its_copy,
    reset_forgets_who_is_running,
    copy_on_write_is_forgotten,
    hit_covers_the_last_token,
    sharing_is_not_counted,
    last_block_is_not_given_back,
    window_is_a_block_short,
    hit_needs_no_window,
    others_slabs_are_not_counted,
    slab_is_given_back_too_early,
    taken_slab_keeps_its_keys,
]
SCHEDULER_BUGS: list[Bug] = [
    block_is_cached_before_its_step_is_collected,
    blocks_do_not_wait_for_steps_in_flight,
    sequence_resumes_while_in_flight,
    token_of_a_preempted_sequence_is_doubled,
    preempted_sequence_keeps_its_place,
    fork_does_not_wait_for_the_prompt,
    siblings_wait_for_ever,
    last_come_is_first_served,
    waiting_does_not_age,
    small_requests_overtake,
    resumed_sequence_owes_nothing,
    stop_by_length_is_noticed_late,
    blocked_head_is_never_tried_again,
    resumption_wants_more_than_there_is,
    too_long_requests_are_taken,
    row_is_given_back_twice,
    chunk_exceeds_the_budget,
    steps_in_flight_are_forgotten,
    parent_far_ahead_is_forked,
]
