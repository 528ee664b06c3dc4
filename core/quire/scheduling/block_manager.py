"""Gives KV blocks to sequences: shares equal beginnings, copies on write, all groups or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

from quire.scheduling.block_pool import BlockPool, BlockTables
from quire.scheduling.footprint import first_kept_block, most_blocks, slabs_for
from quire.scheduling.output import KVCacheGroup
from quire.scheduling.prefix_search import PrefixSearch
from quire.scheduling.sequence import NEVER, Sequence
from quire.scheduling.slab_pool import Slabs, make_pools


class Reservation(NamedTuple):
    """What a sequence got: blocks added to each group's table, and copies to do before writing.

    `copies` are (group, source, destination); the destination is in the table already.
    """

    new_block_ids: BlockTables
    copies: list[tuple[int, int, int]]


class BlockManager:
    """Keeps the block tables of all sequences, over a pool of blocks for each group.

    A sequence gets blocks by `admit` (with what the prefix cache has) or `fork`, then `reserve`s
    more before it writes further, and leaves by `detach` and `give_back`. A call that finds too
    few blocks answers None or False and changes nothing.

    In a group with a window a sequence holds what its next tokens read, and no more of a long
    prompt than fits with a step of `max_step_tokens`: it gives up blocks by `leave_behind`, and
    `reserve`s as many again.
    """

    def __init__(
        self,
        groups: Iterable[KVCacheGroup],
        *,
        enable_prefix_caching: bool,
        max_step_tokens: int = NEVER,
    ) -> None:
        self.groups = tuple(groups)
        self.pools, self.slabs = make_pools(self.groups)
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0  # of the prefix cache, by sequences that were admitted
        self.num_hit_tokens = 0
        self.windows = [(i, g.window) for i, g in enumerate(self.groups) if g.window is not None]
        self._max_step_tokens = max_step_tokens
        self._block_sizes = [group.block_size for group in self.groups]
        self._prefixes = PrefixSearch(self.groups, self.pools)
        self._nobody = [0] * len(self.groups)  # others need no slabs
        self._no_hits: BlockTables = [[] for _ in self.groups]
        self._epoch = 0  # counts resets: what was computed before one is never offered after

    @property
    def _counted(self) -> Iterable[BlockPool | Slabs]:
        """What has blocks to count: slabs count as blocks where groups share them."""
        return self.pools if self.slabs is None else [self.slabs]

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, in the group that has the fewest."""
        return min(counted.num_free for counted in self._counted)

    @property
    def num_blocks(self) -> int:
        """Blocks that can be handed out at all, in the group that has the fewest."""
        return min(counted.num_usable for counted in self._counted)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that some table names, in the group that has the most of them."""
        return max(counted.num_usable - counted.num_free for counted in self._counted)

    @property
    def usage(self) -> float:
        """Share of the blocks that some table names, in the fullest group, from 0 to 1."""
        return max(1 - counted.num_free / counted.num_usable for counted in self._counted)

    def can_ever_fit(self, num_tokens: int, *, num_beams: int = 1, num_shared: int = 0) -> bool:
        """Whether beams of this length that share `num_shared` tokens fit when all is free."""
        held = []
        for group in self.groups:
            size, shared = group.block_size, num_shared // group.block_size
            most = most_blocks(num_tokens, size, group.window, self._max_step_tokens)
            own = min(-(-num_tokens // size) - shared, most)
            held.append(num_beams * own + min(shared, most) if num_beams > 1 else most)
        if self.slabs is not None:
            return slabs_for(self.groups, held) <= self.slabs.num_usable
        return all(count <= pool.num_usable for count, pool in zip(held, self.pools, strict=True))

    def admit(self, sequence: Sequence, *, headroom: int = 0) -> bool:
        """Give a sequence without blocks those for all its tokens, cached ones first.

        In a group with a window, those for as many tokens as it holds blocks for at once. Sets its
        `num_computed_tokens` to what the cache had, never its last token. Leaves `headroom`
        blocks free in every group. False: too few blocks, and nothing changed.
        """
        if self._still_misses_blocks(sequence, headroom):
            return False
        hits = self._find_prefix(sequence)
        others_need = self._room_beside(sequence, hits, headroom)
        if others_need is None:
            self._note_missing(sequence, hits)
            if self.slabs is not None:
                # What was found may lie scattered, a few blocks in each of many slabs.
                hits = [[] for _ in self.pools]
                others_need = self._room_beside(sequence, hits, headroom)
        if others_need is None:
            return False
        for pool, found in zip(self.pools, hits, strict=True):
            pool.share(found)
        wanted = self._table_lengths(sequence, hits)
        sequence.block_tables = [
            [*found, *pool.take(count - len(found), others_need=need)]
            for pool, found, count, need in zip(self.pools, hits, wanted, others_need, strict=True)
        ]
        self._start(sequence, num_computed_tokens=len(hits[0]) * self._block_sizes[0])
        if self.enable_prefix_caching:
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += sequence.num_computed_tokens
        return True

    def _room_beside(
        self, sequence: Sequence, hits: BlockTables, headroom: int
    ) -> list[int] | None:
        """Return `_room` for all that a sequence needs beside its hits."""
        wanted = self._table_lengths(sequence, hits)
        pairs = zip(wanted, hits, strict=True)
        return self._room([count - len(found) + headroom for count, found in pairs], hits)

    def _note_missing(self, sequence: Sequence, hits: BlockTables) -> None:
        """Remember how many blocks an admission needs that are not in use."""
        wanted = self._table_lengths(sequence, hits)
        needed = [
            count - len(found) + pool.num_unused(found)
            for count, found, pool in zip(wanted, hits, self.pools, strict=True)
        ]
        sequence.missing_blocks = (needed, len(hits[0]) * self._block_sizes[0])

    def _table_lengths(self, sequence: Sequence, hits: BlockTables) -> list[int]:
        """Return how long its tables become when it is admitted with these hits."""
        lengths = self._blocks_for(sequence.num_tokens)
        for group, window in self.windows:
            size = self._block_sizes[group]
            first = first_kept_block(len(hits[group]) * size, window, size)
            lengths[group] = min(lengths[group], first + self._most(group))
        return lengths

    def _most(self, group: int) -> int:
        """Return how many blocks of a group with a window a sequence holds at most."""
        window, size = self.groups[group].window, self._block_sizes[group]
        return most_blocks(NEVER, size, window, self._max_step_tokens)

    def _room(self, counts: list[int], hits: BlockTables | None = None) -> list[int] | None:
        """Return None where so many blocks of each group cannot be had beside `hits`.

        Otherwise, for each group, how many slabs those after it need.
        """
        asked = zip(self.pools, counts, hits or self._no_hits, strict=True)
        if self.slabs is None:
            fits = all(count + pool.num_unused(hit) <= pool.num_free for pool, count, hit in asked)
            return self._nobody if fits else None
        missing = [pool.slabs_missing(count, hit) for pool, count, hit in asked]
        if sum(missing) > self.slabs.num_free:
            return None
        return [sum(missing[i + 1 :]) for i in range(len(missing))]

    def can_fork(self, parent: Sequence, num_computed_tokens: int) -> bool:
        """Whether the parent still has all that a token at this position reads."""
        return all(
            parent.num_left_blocks[group]
            <= first_kept_block(num_computed_tokens, window, self._block_sizes[group])
            for group, window in self.windows
        )

    def fork(self, parent: Sequence, child: Sequence, *, num_computed_tokens: int) -> None:
        """Let a sequence without blocks share the parent's first `num_computed_tokens`.

        They must be computed and the same, and `can_fork` hold. The child may not write before it
        `reserve`s, which copies the last block where it is shared in part.
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

    def leave_behind(self, sequence: Sequence, position: int) -> bool:
        """Give up the blocks that no token from `position` on reads; True where there were any.

        No step in flight may read them.
        """
        has_left = False
        for group, window in self.windows:
            table, begin = sequence.block_tables[group], sequence.num_left_blocks[group]
            end = first_kept_block(position, window, self._block_sizes[group])
            if end > begin:
                self.pools[group].give_back(table[begin:end])
                table[begin:end] = [0] * (end - begin)
                sequence.num_left_blocks[group] = end
                has_left = True
        self._foresee_leaving(sequence)
        return has_left

    def _foresee_leaving(self, sequence: Sequence) -> None:
        """Note at which position another block is left behind."""
        sequence.next_leave_at = min(
            [
                (sequence.num_left_blocks[group] + 1) * self._block_sizes[group] + window - 1
                for group, window in self.windows
            ],
            default=NEVER,
        )

    def reserve(self, sequence: Sequence, num_tokens: int) -> Reservation | None:
        """Make the positions from `num_computed_tokens` up to `num_tokens` writable.

        Adds blocks, and replaces the first one by a copy where others read it. In a group with a
        window, only the next `max_step_tokens` need be; what it left behind it gets again, for
        tokens that it has already. None: too few blocks, and nothing changed.
        """
        lengths = self._blocks_for(num_tokens)
        reservation = None
        if self.windows:
            reservation = self._reserve(sequence, self._ahead(sequence, num_tokens, lengths))
        return reservation or self._reserve(sequence, lengths)

    def _ahead(self, sequence: Sequence, num_tokens: int, lengths: list[int]) -> list[int]:
        """Cut `lengths` in groups with a window to a step's; return what they would better be."""
        ahead = list(lengths)
        next_end = sequence.num_computed_tokens + self._max_step_tokens
        for group, _ in self.windows:
            size = self._block_sizes[group]
            known = -(-max(num_tokens, sequence.num_tokens) // size)
            lengths[group] = min(lengths[group], -(-next_end // size))
            held = sequence.num_left_blocks[group] + self._most(group)
            ahead[group] = max(lengths[group], min(known, held))
        return ahead

    def _reserve(self, sequence: Sequence, lengths: list[int]) -> Reservation | None:
        """Make the tables so long, and the first block to write to the sequence's own."""
        start = sequence.num_computed_tokens
        counts: list[int] = []
        shared: list[int] = []  # groups whose first block to write is read by others
        for group, (pool, size) in enumerate(zip(self.pools, self._block_sizes, strict=True)):
            table = sequence.block_tables[group]
            needed = max(lengths[group] - len(table), 0)
            if start < len(table) * size and not pool.is_writable(table[start // size]):
                shared.append(group)
                needed += 1
            if self.slabs is None and needed > pool.num_free:
                return None
            counts.append(needed)
        others_need = self._nobody if self.slabs is None else self._room(counts)
        if others_need is None:
            return None
        copies, new_block_ids = [], []
        num_reserved = NEVER
        for group, table in enumerate(sequence.block_tables):
            block_ids = self.pools[group].take(counts[group], others_need=others_need[group])
            if group in shared:
                copies.append(self._replace_by_copy(sequence, group, block_ids.pop(0)))
            table.extend(block_ids)
            new_block_ids.append(block_ids)
            num_reserved = min(num_reserved, len(table) * self._block_sizes[group])
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
        chain = self._prefixes.chain(sequence, group, end)
        for place in range(first, end):
            if table[place]:  # 0 where a fork got no block that its window does not need
                cache.add(chain[place], table[place])

    def detach(self, sequence: Sequence) -> BlockTables:
        """Take the tables from a sequence; its blocks stay in use until they are given back."""
        tables, sequence.block_tables = sequence.block_tables, []
        sequence.num_left_blocks = []
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
        needed, num_found = sequence.missing_blocks
        if self._room([count + headroom for count in needed]) is not None:
            return False
        return not self._prefixes.may_find_more(sequence, num_found)

    def _find_prefix(self, sequence: Sequence) -> BlockTables:
        """Find the longest beginning that every group still serves, without the last token."""
        if not self.enable_prefix_caching or sequence.owes_prompt_logprobs:
            return [[] for _ in self.pools]
        return self._prefixes.find(sequence, sequence.num_tokens - 1)

    def _start(self, sequence: Sequence, *, num_computed_tokens: int) -> None:
        sequence.num_computed_tokens = num_computed_tokens
        sequence.missing_blocks = None
        if self.windows:
            sequence.num_left_blocks = [table.count(0) for table in sequence.block_tables]
            self._foresee_leaving(sequence)
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

    def _replace_by_copy(
        self, sequence: Sequence, group: int, block_id: int
    ) -> tuple[int, int, int]:
        """Give the sequence a block of its own for the next one it writes to."""
        table = sequence.block_tables[group]
        place = sequence.num_computed_tokens // self._block_sizes[group]
        source, table[place] = table[place], block_id
        self.pools[group].give_back([source])
        return group, source, block_id
