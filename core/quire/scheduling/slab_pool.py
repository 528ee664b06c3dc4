"""Blocks of several groups cut from the same memory: what one group gives back another can have.

The memory is divided into slabs. A slab is one group's while any of its blocks is in use: one
block of the group with the most layers, several of a group with fewer. Groups with equal numbers
of layers have one block a slab, and any free block serves any group.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence

from quire.errors import ConfigError
from quire.scheduling.block_pool import BlockPool
from quire.scheduling.output import KVCacheGroup


class Slabs:
    """Which slabs are free, or hold nothing but blocks that the prefix cache may forget.

    Slab 0 is never given out: block 0 of every group lies there.
    """

    __slots__ = ("free", "idle", "num_slabs")

    def __init__(self, num_slabs: int) -> None:
        self.num_slabs = num_slabs
        self.free = list(range(num_slabs - 1, 0, -1))  # a stack: low ones first
        self.idle: OrderedDict[int, SlabPool] = OrderedDict()  # least recently used first

    @property
    def num_usable(self) -> int:
        """Slabs that can be handed out in all."""
        return self.num_slabs - 1

    @property
    def num_free(self) -> int:
        """Slabs that can be handed out now."""
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """Hand out a slab; what was cached in it is forgotten."""
        if self.free:
            return self.free.pop()
        slab, pool = self.idle.popitem(last=False)
        pool.forget(slab)
        return slab


class SlabPool(BlockPool):
    """The blocks of one group over slabs that other groups have, too.

    Block ids of slab s are s, s + stride, and so on. In a slab that the group holds, blocks are in
    one of the three places of `BlockPool`; in an idle slab none is in use or handed out singly.
    """

    __slots__ = ("_blocks_per_slab", "_num_in_use", "_slabs", "_spare", "_stride")

    def __init__(self, slabs: Slabs, *, blocks_per_slab: int, stride: int) -> None:
        super().__init__(slabs.num_slabs)
        self.num_tables: dict[int, int] = defaultdict(int)  # of blocks in use
        self._slabs = slabs
        self._blocks_per_slab = blocks_per_slab
        self._stride = stride
        self._num_in_use: dict[int, int] = {}  # of the slabs that the group holds
        self._spare: dict[int, None] = {}  # free blocks of those

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out in all, were there no other group."""
        return self._slabs.num_usable * self._blocks_per_slab

    @property
    def num_spare(self) -> int:
        """Blocks that can be handed out now in slabs that the group holds."""
        return len(self._spare) + self.cache.num_idle

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, were there no other group."""
        return self.num_spare + self._slabs.num_free * self._blocks_per_slab

    def num_unused(self, block_ids: Iterable[int]) -> int:
        """Return how many of some cached blocks no table names."""
        return sum(block_id not in self.num_tables for block_id in filter(None, block_ids))

    def slabs_missing(self, count: int, hits: Iterable[int]) -> int:
        """Return how many slabs must be free for sharing `hits` and taking `count` more blocks."""
        spare = self.num_spare
        revived = set()
        for block_id in filter(None, hits):
            if block_id not in self.num_tables:
                spare -= 1
                slab = block_id % self._stride
                if slab not in self._num_in_use:
                    revived.add(slab)
        spare += len(revived) * self._blocks_per_slab
        return len(revived) + max(0, -(-(count - spare) // self._blocks_per_slab))

    def take(self, count: int, *, others_need: int = 0) -> list[int]:
        """Hand out `count` blocks with one table each; there must be as many free.

        What is cached goes when there are no more free slabs than the other groups need.
        """
        block_ids = []
        for _ in range(count):
            if self._spare:
                block_id, _ = self._spare.popitem()
            elif self.cache.num_idle and len(self._slabs.free) <= others_need:
                block_id = self.cache.evict()
            else:
                block_id = self._slabs.take()
                self._num_in_use[block_id] = 0
                self._spare.update(dict.fromkeys(reversed(self._blocks_of(block_id)[1:])))
            self._num_in_use[block_id % self._stride] += 1
            self.num_tables[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Count one more table for each block; idle ones come back into use. Block 0 is none."""
        for block_id in filter(None, block_ids):
            if block_id not in self.num_tables:
                slab = block_id % self._stride
                if slab not in self._num_in_use:
                    self._hold(slab)
                self.cache.revive(block_id)
                self._num_in_use[slab] += 1
            self.num_tables[block_id] += 1

    def _blocks_of(self, slab: int) -> Sequence[int]:
        return range(slab, slab + self._stride * self._blocks_per_slab, self._stride)

    def _hold(self, slab: int) -> None:
        """Take an idle slab of the group back into use."""
        del self._slabs.idle[slab]
        self._num_in_use[slab] = 0
        for block_id in self._blocks_of(slab):
            if self.cache.holds(block_id):
                self.cache.retire(block_id)
            else:
                self._spare[block_id] = None

    def _lay_aside(self, block_id: int) -> None:
        del self.num_tables[block_id]
        if self.cache.holds(block_id):
            self.cache.retire(block_id)
        else:
            self._spare[block_id] = None
        slab = block_id % self._stride
        self._num_in_use[slab] -= 1
        if self._num_in_use[slab] == 0:
            self._let_go(slab)

    def _let_go(self, slab: int) -> None:
        """Offer a slab to all groups, of which no block is in use."""
        del self._num_in_use[slab]
        is_findable = False
        for block_id in self._blocks_of(slab):
            if self.cache.holds(block_id):
                self.cache.revive(block_id)
                is_findable = True
            else:
                del self._spare[block_id]
        if is_findable:
            self._slabs.idle[slab] = self
        else:
            self._slabs.free.append(slab)

    def forget(self, slab: int) -> None:
        """Make no block of an idle slab findable."""
        for block_id in self._blocks_of(slab):
            self.cache.forget(block_id)

    def reset_cache(self) -> None:
        """Make no block findable; blocks in use stay with their tables."""
        self._spare.update(dict.fromkeys(self.cache.reset()))
        for slab, pool in list(self._slabs.idle.items()):
            if pool is self:
                del self._slabs.idle[slab]
                self._slabs.free.append(slab)


def make_pools(groups: Sequence[KVCacheGroup]) -> tuple[list[BlockPool], Slabs | None]:
    """Return a pool for each group, and the slabs that they share, where they do.

    Raises: ConfigError where a group has no block to hand out, or blocks of an odd size.
    """
    for group in groups:
        _check_group(group)
    if any(group.blocks_per_slab is None for group in groups):
        return [BlockPool(group.num_blocks) for group in groups], None
    slabs = Slabs(groups[0].num_blocks)
    pools: list[BlockPool] = [
        SlabPool(slabs, blocks_per_slab=group.blocks_per_slab or 1, stride=group.block_stride)
        for group in groups
    ]
    return pools, slabs


def _check_group(group: KVCacheGroup) -> None:
    if group.num_blocks < 2:
        raise ConfigError(
            f"a KV cache group has {group.num_blocks} blocks; it needs 2 or more, since block 0 "
            f"is never allocated. Give the KV cache more memory."
        )
    if group.block_size < 1 or group.block_size & (group.block_size - 1):
        raise ConfigError(f"block size is {group.block_size}; allowed: powers of two from 1.")
