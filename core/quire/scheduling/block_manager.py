"""Gives KV blocks to sequences: shares equal beginnings, copies on write, all groups or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

from quire.errors import ConfigError
from quire.scheduling.block_pool import BlockPool
from quire.scheduling.output import KVCacheGroup
from quire.scheduling.prefix_cache import extend_chain
from quire.scheduling.sequence import NEVER, Sequence

BlockTables = list[list[int]]
"""One list of block ids a group: entry i holds positions i * block_size and on."""


class Reservation(NamedTuple):
    """What a sequence got: blocks added to each group's table, and copies to do before writing.

    `copies` are (group, source, destination); the destination is in the table already.
    """

    new_block_ids: BlockTables
    copies: list[tuple[int, int, int]]


class BlockManager:
    """Keeps the block tables of all sequences over one pool of blocks a group.

    A sequence gets blocks by `admit` (with what the prefix cache has) or `fork`, then `reserve`s
    more before it writes further, and leaves by `detach` and `give_back`. A call that finds too
    few blocks answers None or False and changes nothing.
    """

    def __init__(self, groups: Iterable[KVCacheGroup], *, enable_prefix_caching: bool) -> None:
        self.groups = tuple(groups)
        for group in self.groups:
            _check_group(group)
        self.pools = [BlockPool(group.num_blocks) for group in self.groups]
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0  # of the prefix cache, by sequences that were admitted
        self.num_hit_tokens = 0
        self._block_sizes = [group.block_size for group in self.groups]
        self._chain_sizes = sorted(set(self._block_sizes))  # groups of equal size share a chain
        self._chain_of_group = [self._chain_sizes.index(size) for size in self._block_sizes]
        self._epoch = 0  # counts resets: what was computed before one is never offered after

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, in the group that has the fewest."""
        return min(pool.num_free for pool in self.pools)

    @property
    def num_blocks(self) -> int:
        """Blocks that can be handed out at all, in the group that has the fewest."""
        return min(pool.num_usable for pool in self.pools)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that some table names, in the group that has the most of them."""
        return max(pool.num_usable - pool.num_free for pool in self.pools)

    @property
    def usage(self) -> float:
        """Share of the blocks that some table names, in the fullest group, from 0 to 1."""
        return max(1 - pool.num_free / pool.num_usable for pool in self.pools)

    def can_ever_fit(self, num_tokens: int, *, num_beams: int = 1, num_shared: int = 0) -> bool:
        """Whether beams of this length that share `num_shared` tokens fit when all is free."""
        counts = zip(self._blocks_for(num_tokens), self._block_sizes, self.pools, strict=True)
        return all(
            num_beams * (blocks - num_shared // size) + num_shared // size <= pool.num_usable
            for blocks, size, pool in counts
        )

    def admit(self, sequence: Sequence, *, headroom: int = 0) -> bool:
        """Give a sequence without blocks those for all its tokens, cached ones first.

        Sets its `num_computed_tokens` to what the cache had, never its last token. Leaves
        `headroom` blocks free in every group. False: too few blocks, and nothing changed.
        """
        if self._still_misses_blocks(sequence, headroom):
            return False
        hits = self._find_prefix(sequence)
        wanted = self._blocks_for(sequence.num_tokens)
        for i, (pool, found) in enumerate(zip(self.pools, hits, strict=True)):
            needed = wanted[i] - len(found) + sum(map(pool.cache.is_idle, found))
            if needed + headroom > pool.num_free:
                sequence.missing_blocks = (i, needed, len(found))
                return False
        for pool, found in zip(self.pools, hits, strict=True):
            pool.share(found)
        sequence.block_tables = [
            [*found, *pool.take(count - len(found))]
            for pool, found, count in zip(self.pools, hits, wanted, strict=True)
        ]
        self._start(sequence, num_computed_tokens=len(hits[0]) * self._block_sizes[0])
        if self.enable_prefix_caching:
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += sequence.num_computed_tokens
        return True

    def fork(self, parent: Sequence, child: Sequence, *, num_computed_tokens: int) -> None:
        """Let a sequence without blocks share the parent's first `num_computed_tokens`.

        They must be computed and the same. The child may not write before it `reserve`s, which
        copies the last block where it is shared in part.
        """
        child.block_tables = [
            parent.block_tables[i][:count]
            for i, count in enumerate(self._blocks_for(num_computed_tokens))
        ]
        for pool, table in zip(self.pools, child.block_tables, strict=True):
            pool.share(table)
        self._start(child, num_computed_tokens=num_computed_tokens)
        child.cache_epoch = parent.cache_epoch

    def fork_all(
        self, parent: Sequence, child: Sequence, *, num_computed_tokens: int
    ) -> list[tuple[int, int, int]] | None:
        """Fork, and reserve blocks for all of the child's tokens; return the copies to do.

        None: too few blocks, and nothing changed.
        """
        self.fork(parent, child, num_computed_tokens=num_computed_tokens)
        reservation = self.reserve(child, child.num_tokens)
        if reservation is None:
            self.give_back(self.detach(child))
            return None
        return reservation.copies

    def follow(self, child: Sequence, parent: Sequence) -> list[int]:
        """Let a sequence give up its blocks, which no step in flight names, for the parent's.

        Returns from which block on its table differs from what it was, by group.
        """
        before = self.detach(child)
        self.fork(parent, child, num_computed_tokens=parent.num_computed_tokens)
        self.give_back(before)
        return [
            sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
            for old, new in zip(before, child.block_tables, strict=True)
        ]

    def reserve(self, sequence: Sequence, num_tokens: int) -> Reservation | None:
        """Make the positions from `num_computed_tokens` up to `num_tokens` writable.

        Adds blocks, and replaces the first one by a copy where others read it. None: too few
        blocks, and nothing changed.
        """
        start = sequence.num_computed_tokens
        shared: list[int] = []  # groups whose first block to write is read by others
        for group, (pool, size) in enumerate(zip(self.pools, self._block_sizes, strict=True)):
            table = sequence.block_tables[group]
            needed = max(-(-num_tokens // size) - len(table), 0)
            if start < len(table) * size and not pool.is_writable(table[start // size]):
                shared.append(group)
                needed += 1
            if needed > pool.num_free:
                return None
        copies = [self._replace_by_copy(sequence, group) for group in shared]
        new_block_ids = []
        num_reserved = NEVER
        for pool, size, table in zip(
            self.pools, self._block_sizes, sequence.block_tables, strict=True
        ):
            block_ids = pool.take(-(-num_tokens // size) - len(table))
            table.extend(block_ids)
            new_block_ids.append(block_ids)
            num_reserved = min(num_reserved, len(table) * size)
        sequence.num_reserved_tokens = num_reserved
        return Reservation(new_block_ids, copies)

    def commit(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Make the full blocks below findable, once the step that computed them is collected."""
        if sequence.cache_epoch != self._epoch:
            sequence.next_commit_at = NEVER
            return
        committed = sequence.num_committed_blocks
        next_commit_at = NEVER
        for group, size in enumerate(self._block_sizes):
            first, end = committed[group], num_computed_tokens // size
            if end > first:
                self._commit_blocks(sequence, group, first, end)
                committed[group] = end
            next_commit_at = min(next_commit_at, (max(first, end) + 1) * size)
        sequence.next_commit_at = next_commit_at

    def _commit_blocks(self, sequence: Sequence, group: int, first: int, end: int) -> None:
        cache, table = self.pools[group].cache, sequence.block_tables[group]
        chain = self._chain(sequence, group, end)
        for place in range(first, end):
            cache.add(chain[place], table[place])

    def detach(self, sequence: Sequence) -> BlockTables:
        """Take the tables from a sequence; its blocks stay in use until they are given back."""
        tables, sequence.block_tables = sequence.block_tables, []
        sequence.num_reserved_tokens = 0
        sequence.num_committed_blocks = []
        sequence.next_commit_at = NEVER
        return tables

    def give_back(self, tables: BlockTables) -> None:
        """Free the blocks of detached tables, those that no other table names."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.give_back(table)

    def reset_prefix_cache(self) -> None:
        """Forget all cached blocks; what running sequences compute from them is not cached."""
        self._epoch += 1
        for pool in self.pools:
            pool.reset_cache()

    def _blocks_for(self, num_tokens: int) -> list[int]:
        return [-(-num_tokens // size) for size in self._block_sizes]

    def _still_misses_blocks(self, sequence: Sequence, headroom: int) -> bool:
        """Whether an admission would fail again, without the search through a long prefix.

        The head of the queue asks every step. It is searched again when enough blocks are free,
        or when the cache has got the first block that it had not.
        """
        if sequence.missing_blocks is None:
            return False
        group, needed, num_found = sequence.missing_blocks
        if needed + headroom <= self.pools[group].num_free:
            return False
        chain = self._chain(sequence, group, 0)
        cache = self.pools[group].cache
        return num_found >= len(chain) or cache.find(chain[num_found]) is None

    def _start(self, sequence: Sequence, *, num_computed_tokens: int) -> None:
        sequence.num_computed_tokens = num_computed_tokens
        sequence.missing_blocks = None
        sequence.num_reserved_tokens = min(
            [
                len(table) * size
                for table, size in zip(sequence.block_tables, self._block_sizes, strict=True)
            ]
        )
        if self.enable_prefix_caching:
            sequence.cache_epoch = self._epoch
            sequence.num_committed_blocks = [num_computed_tokens // s for s in self._block_sizes]
            sequence.next_commit_at = min(
                (num_computed_tokens // size + 1) * size for size in self._block_sizes
            )

    def _find_prefix(self, sequence: Sequence) -> BlockTables:
        """Find the longest beginning that every group still has, without the last token."""
        if not self.enable_prefix_caching or sequence.owes_prompt_logprobs:
            return [[] for _ in self.pools]
        num_tokens = sequence.num_tokens - 1
        hits: BlockTables = []
        for group, size in enumerate(self._block_sizes):
            # A window group needs only the blocks inside the window before the hit's end; until
            # blocks outside it are freed, it has all of them, like a full group.
            hits.append(self._find_blocks(sequence, group, num_tokens // size))
            num_tokens = len(hits[-1]) * size
        num_tokens -= num_tokens % max(self._block_sizes)
        return [
            found[: num_tokens // size] for found, size in zip(hits, self._block_sizes, strict=True)
        ]

    def _find_blocks(self, sequence: Sequence, group: int, max_blocks: int) -> list[int]:
        cache = self.pools[group].cache
        found: list[int] = []
        while len(found) < max_blocks:
            # Hash no further than the cache answers; commit hashes the rest.
            chain = self._chain(sequence, group, len(found) + 1)
            block_id = cache.find(chain[len(found)])
            if block_id is None:
                break
            found.append(block_id)
        return found

    def _chain(self, sequence: Sequence, group: int, num_blocks: int) -> list[bytes]:
        """Return the keys of the sequence's blocks, at least `num_blocks`, each hashed once."""
        if not sequence.digests:
            sequence.digests = [[] for _ in self._chain_sizes]
        which = self._chain_of_group[group]
        chain = sequence.digests[which]
        if len(chain) < num_blocks:
            size, salt = self._chain_sizes[which], sequence.request.cache_salt
            extend_chain(chain, sequence.token_ids, size, num_blocks, salt)
        return chain

    def _replace_by_copy(self, sequence: Sequence, group: int) -> tuple[int, int, int]:
        """Give the sequence a block of its own for the next one it writes to."""
        pool, table = self.pools[group], sequence.block_tables[group]
        place = sequence.num_computed_tokens // self._block_sizes[group]
        source = table[place]
        (table[place],) = pool.take(1)
        pool.give_back([source])
        return group, source, table[place]


def _check_group(group: KVCacheGroup) -> None:
    if group.num_blocks < 2:
        raise ConfigError(
            f"a KV cache group has {group.num_blocks} blocks; it needs 2 or more, since block 0 "
            f"is never allocated. Give the KV cache more memory."
        )
    if group.block_size < 1 or group.block_size & (group.block_size - 1):
        raise ConfigError(f"block size is {group.block_size}; allowed: powers of two from 1.")
