"""The KV blocks of one group: which are free, and how many tables name each of the others."""

from __future__ import annotations

from collections.abc import Iterable

from quire.scheduling.prefix_cache import PrefixCache

BlockTables = list[list[int]]
"""One list of block ids a group: entry i holds positions i * block_size and on; 0 is no block."""


class BlockPool:
    """Hands out block ids from 1; block 0 is never allocated, padding rows write there.

    Every block is in one of three places:

        free list           num_tables 0, contents of no use
        idle in the cache   num_tables 0, contents findable; evicted when the free list is empty
        in use              num_tables >= 1, findable or not

    The same calls give the same ids.
    """

    __slots__ = ("_free", "cache", "num_blocks", "num_tables")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_tables: list[int] | dict[int, int] = [0] * num_blocks  # by block id
        self.cache = PrefixCache()
        self._free = list(range(num_blocks - 1, 0, -1))  # a stack: low ids first

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out in all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now: the free list and the idle ones of the cache."""
        return len(self._free) + self.cache.num_idle

    def is_writable(self, block_id: int) -> bool:
        """Whether one table alone names the block and nobody can find it."""
        return self.num_tables[block_id] == 1 and not self.cache.holds(block_id)

    def num_unused(self, block_ids: Iterable[int]) -> int:
        """Return how many of some cached blocks no table names."""
        return sum(map(self.cache.is_idle, block_ids))

    def slabs_missing(self, count: int, hits: Iterable[int]) -> int:
        """Return how many slabs must be free for sharing `hits` and taking `count` more blocks."""
        raise NotImplementedError(f"{type(self).__name__} has no slabs")

    def take(self, count: int, *, others_need: int = 0) -> list[int]:
        """Hand out `count` blocks with one table each; there must be as many free.

        `others_need` slabs stay free, where the pool shares them.
        """
        block_ids = []
        for _ in range(count):
            block_id = self._free.pop() if self._free else self.cache.evict()
            self.num_tables[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Count one more table for each block; idle ones come back into use. Block 0 is none."""
        for block_id in filter(None, block_ids):
            if self.num_tables[block_id] == 0:
                self.cache.revive(block_id)
            self.num_tables[block_id] += 1

    def give_back(self, block_ids: list[int]) -> None:
        """Count one table less for each block of one table; block 0 stands for none.

        Last block first: the tail of a prompt is least likely to be shared, so it should be
        evicted before the common prefix.
        """
        for block_id in reversed(block_ids):
            if block_id == 0:
                return  # the blocks before were left behind, too
            left = self.num_tables[block_id] - 1
            assert left >= 0, f"block {block_id} is given back twice"
            self.num_tables[block_id] = left
            if left == 0:
                self._lay_aside(block_id)

    def _lay_aside(self, block_id: int) -> None:
        if self.cache.holds(block_id):
            self.cache.retire(block_id)
        else:
            self._free.append(block_id)

    def reset_cache(self) -> None:
        """Make no block findable; blocks in use stay with their tables."""
        self._free.extend(self.cache.reset())
