"""What must hold of blocks at every moment, whatever happened before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from quire.scheduling.block_manager import BlockManager
from quire.scheduling.block_pool import BlockPool, BlockTables
from quire.scheduling.scheduler import Scheduler
from quire.scheduling.slab_pool import SlabPool


def check_pools(manager: BlockManager, all_tables: Iterable[BlockTables]) -> None:
    """Check every pool against all tables that exist, detached ones included."""
    tables = list(all_tables)
    held = []
    for group, pool in enumerate(manager.pools):
        uses = Counter(block for t in tables if t for block in t[group] if block)
        if isinstance(pool, SlabPool):
            held += _check_slab_pool(pool, uses)
        else:
            _check_pool(pool, uses)
    if manager.slabs is not None:
        slabs = [*held, *manager.slabs.free, *manager.slabs.idle]
        expected = list(range(1, manager.slabs.num_slabs))
        assert sorted(slabs) == expected, f"a slab is in two hands or in none: {sorted(slabs)}"


def _check_pool(pool: BlockPool, uses: Counter[int]) -> None:
    free, cache = pool._free, pool.cache
    counts = {block: count for block, count in enumerate(pool.num_tables) if count}
    assert counts == uses, f"tables name {dict(uses)}, counted {counts}"
    places = [*free, *cache._idle, *uses]
    assert len(set(places)) == len(places), f"a block is in two places: {places}"
    assert len(places) == pool.num_usable, f"{len(places)} of {pool.num_usable} blocks are known"
    assert 0 not in places, "block 0 is never allocated"
    assert pool.num_free + len(uses) == pool.num_usable, "free and used are not all"
    _check_cache(pool, free)


def _check_slab_pool(pool: SlabPool, uses: Counter[int]) -> list[int]:
    """Check the blocks of a group; return the slabs that it holds."""
    assert pool.num_tables == uses, f"tables name {dict(uses)}, counted {pool.num_tables}"
    in_use = Counter(block % pool._stride for block in uses)
    assert pool._num_in_use == in_use, f"slabs {dict(in_use)}, counted {pool._num_in_use}"
    places = [*pool._spare, *pool.cache._idle, *uses]
    blocks = [block for slab in in_use for block in pool._blocks_of(slab)]
    assert sorted(places) == sorted(blocks), f"blocks of {list(in_use)}: {sorted(places)}"
    own = [slab for slab, owner in pool._slabs.idle.items() if owner is pool]
    findable = {block for slab in own for block in pool._blocks_of(slab)}
    known = {block % pool._stride for block in pool.cache._digests}
    assert set(own) <= known, "an idle slab holds nothing"
    assert pool.cache._digests.keys() <= {*findable, *blocks}, "others' blocks can be found"
    _check_cache(pool, list(pool._spare))
    return list(in_use)


def _check_cache(pool: BlockPool, free: list[int]) -> None:
    cache = pool.cache
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
