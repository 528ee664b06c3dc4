"""What must hold of blocks at every moment, whatever happened before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from quire.scheduling.block_manager import BlockManager, BlockTables
from quire.scheduling.block_pool import BlockPool
from quire.scheduling.scheduler import Scheduler


def check_pools(manager: BlockManager, all_tables: Iterable[BlockTables]) -> None:
    """Check every pool against all tables that exist, detached ones included."""
    tables = list(all_tables)
    for group, pool in enumerate(manager.pools):
        _check_pool(pool, Counter(block for t in tables if t for block in t[group]))


def _check_pool(pool: BlockPool, uses: Counter[int]) -> None:
    free, cache = pool._free, pool.cache
    counts = {block: count for block, count in enumerate(pool.num_tables) if count}
    assert counts == uses, f"tables name {dict(uses)}, counted {counts}"
    places = [*free, *cache._idle, *uses]
    assert len(set(places)) == len(places), f"a block is in two places: {places}"
    assert len(places) == pool.num_usable, f"{len(places)} of {pool.num_usable} blocks are known"
    assert 0 not in places, "block 0 is never allocated"
    assert pool.num_free + len(uses) == pool.num_usable, "free and used are not all"
    findable = cache._digests.keys()
    assert cache._idle.keys() <= findable, "an idle block cannot be found"
    assert findable.isdisjoint(free), "a free block can be found"
    assert len(findable) == len(cache._block_ids), "a key and its block disagree"


def check_scheduler(scheduler: Scheduler, max_num_seqs: int) -> None:
    """Check the scheduler's blocks and rows against its running sequences."""
    running = list(scheduler._running)
    detached = [tables for step in scheduler._in_flight for tables in step.releases]
    check_pools(scheduler._blocks, [*(s.block_tables for s in running), *detached])
    rows = [*(s.row for s in running), *scheduler._free_rows]
    assert sorted(rows) == list(range(max_num_seqs)), f"rows {rows}"


def check_nothing_is_left(scheduler: Scheduler) -> None:
    """Check that a scheduler that has served everybody remembers nobody."""
    assert not scheduler.has_unfinished()
    assert scheduler.num_running == scheduler.num_waiting == scheduler.num_steps_in_flight == 0
    assert not scheduler._requests
    assert not scheduler._waiting._siblings
    assert scheduler._blocks.usage == 0
