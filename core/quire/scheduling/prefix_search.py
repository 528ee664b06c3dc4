"""How much of a sequence's beginning every group of layers still has in its prefix cache."""

from __future__ import annotations

from collections.abc import Sequence as Items

from quire.scheduling.block_pool import BlockPool, BlockTables
from quire.scheduling.footprint import first_kept_block
from quire.scheduling.output import KVCacheGroup
from quire.scheduling.prefix_cache import extend_chain
from quire.scheduling.sequence import Sequence


class PrefixSearch:
    """Finds hits over the pools of all groups; changes nothing but a sequence's digests.

    A group that reads everything serves a beginning of which it has all blocks. A group with a
    window serves one of which it has the last window, whatever it has of the rest.
    """

    def __init__(self, groups: Items[KVCacheGroup], pools: Items[BlockPool]) -> None:
        self._groups = groups
        self._caches = [pool.cache for pool in pools]
        sizes = [group.block_size for group in groups]
        self._coarsest = max(sizes)
        whole = [number for number, group in enumerate(groups) if group.window is None]
        self._whole = whole[0] if whole else None
        self._chain_sizes = sorted(set(sizes))  # groups of equal size share a chain
        self._chain_of_group = [self._chain_sizes.index(size) for size in sizes]

    def find(self, sequence: Sequence, num_tokens: int) -> BlockTables:
        """Return the blocks of the longest beginning within `num_tokens`, equal in all groups.

        Blocks that a window does not need are 0.
        """
        hits: dict[int, list[int]] = {}
        for number, group in enumerate(self._groups):
            if group.window is None:
                hits[number] = self._find_all(sequence, number, num_tokens // group.block_size)
                num_tokens = len(hits[number]) * group.block_size
        num_tokens -= num_tokens % self._coarsest
        if len(hits) < len(self._groups):
            num_tokens = self._served_by_windows(sequence, num_tokens)
        return [
            hits[number][: num_tokens // group.block_size]
            if group.window is None
            else self._last_window(sequence, number, group.window, num_tokens)
            for number, group in enumerate(self._groups)
        ]

    def may_find_more(self, sequence: Sequence, num_found: int) -> bool:
        """Whether a search that found so many tokens might now find more.

        Asked of the first block that it missed, in a group that needs all of them; where none
        does, of the last block that it could hit.
        """
        if self._whole is None:
            number, last = 0, (sequence.num_tokens - 1) // self._groups[0].block_size
            chain = self.chain(sequence, number, last)
            place = max(last - 1, num_found // self._groups[0].block_size)
        else:
            number, chain = self._whole, self.chain(sequence, self._whole, 0)
            place = num_found // self._groups[number].block_size
        return place < len(chain) and self._caches[number].find(chain[place]) is not None

    def _find_all(self, sequence: Sequence, number: int, max_blocks: int) -> list[int]:
        cache = self._caches[number]
        found: list[int] = []
        while len(found) < max_blocks:
            # Hash no further than the cache answers; commit hashes the rest.
            chain = self.chain(sequence, number, len(found) + 1)
            block_id = cache.find(chain[len(found)])
            if block_id is None:
                break
            found.append(block_id)
        return found

    def _served_by_windows(self, sequence: Sequence, num_tokens: int) -> int:
        """Return the longest beginning up to there that every group with a window serves."""
        before = None
        while num_tokens != before:
            before = num_tokens
            for number, group in enumerate(self._groups):
                if group.window is not None:
                    num_tokens = self._served(sequence, number, group.window, num_tokens)
        return num_tokens

    def _served(self, sequence: Sequence, number: int, window: int, num_tokens: int) -> int:
        cache, size = self._caches[number], self._groups[number].block_size
        if len(cache) == 0 and window > 1:
            return 0
        chain = self.chain(sequence, number, num_tokens // size)
        place = num_tokens // size - 1
        while place >= first_kept_block(num_tokens, window, size):
            if cache.find(chain[place]) is None:
                # Every longer beginning up to here needs this block.
                num_tokens = place * size // self._coarsest * self._coarsest
                place = num_tokens // size
            place -= 1
        return num_tokens

    def _last_window(
        self, sequence: Sequence, number: int, window: int, num_tokens: int
    ) -> list[int]:
        cache, size = self._caches[number], self._groups[number].block_size
        first, end = first_kept_block(num_tokens, window, size), num_tokens // size
        found = [cache.find(key) for key in self.chain(sequence, number, end)[first:end]]
        return [*[0] * first, *[block_id for block_id in found if block_id is not None]]

    def chain(self, sequence: Sequence, number: int, num_blocks: int) -> list[bytes]:
        """Return the keys of the sequence's blocks, at least `num_blocks`, each hashed once."""
        if not sequence.digests:
            sequence.digests = [[] for _ in self._chain_sizes]
        which = self._chain_of_group[number]
        chain = sequence.digests[which]
        if len(chain) < num_blocks:
            size, salt = self._chain_sizes[which], sequence.request.cache_salt
            extend_chain(chain, sequence.token_ids, size, num_blocks, salt)
        return chain
