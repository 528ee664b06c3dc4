"""Drives the block manager at random, with an oracle that knows what every slot should hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
from attrs import define, frozen
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from invariants import check_pools

from quire.request import Request, SamplingParams
from quire.scheduling.block_manager import BlockManager
from quire.scheduling.block_pool import BlockPool, BlockTables
from quire.scheduling.output import KVCacheGroup
from quire.scheduling.sequence import Sequence
from quire.scheduling.slab_pool import SlabPool, Slabs

Slot = tuple[int, int, int]  # group, block id, offset
PARAMS = SamplingParams()
TEXT = [0, 1, 1, 0, 0, 0, 1, 0, 1, 1]
# Beginnings of one text, most of them, so that sequences meet in the cache.
PROMPTS = st.one_of(
    st.sampled_from([4, 5, 6, 8, 9, 10, 1, 2, 3, 7]).map(lambda length: TEXT[:length]),
    st.integers(1, len(TEXT)).map(lambda length: [*TEXT[: length - 1], 1 - TEXT[length - 1]]),
)


class FlakyPool(BlockPool):
    """A pool that can be told to have nothing free."""

    __slots__ = ()
    empty = False

    @property
    def num_free(self) -> int:
        return 0 if FlakyPool.empty else super().num_free


class FlakySlabPool(SlabPool):
    """The same, of a group that shares slabs."""

    __slots__ = ()

    @property
    def num_spare(self) -> int:
        return 0 if FlakyPool.empty else super().num_spare


class FlakySlabs(Slabs):
    """Slabs that none may be had of."""

    __slots__ = ()

    @property
    def num_free(self) -> int:
        return 0 if FlakyPool.empty else super().num_free


@frozen
class Kind:
    """Groups of layers: block sizes, windows, and blocks a slab where they share slabs."""

    sizes: tuple[int, ...]
    windows: tuple[int | None, ...] = ()
    blocks_per_slab: tuple[int | None, ...] = ()

    def groups(self, num_blocks: int) -> list[KVCacheGroup]:
        """Return the groups, each with so many blocks, or all with so many slabs."""
        none = (None,) * len(self.sizes)
        columns = (self.sizes, self.windows or none, self.blocks_per_slab or none)
        return [
            KVCacheGroup(
                layers=(g,),
                block_size=size,
                bytes_per_block=1,
                num_blocks=num_blocks,
                window=window,
                blocks_per_slab=blocks_per_slab,
                block_stride=20 + g,
            )
            for g, (size, window, blocks_per_slab) in enumerate(zip(*columns, strict=True))
        ]


KINDS = [
    Kind((2,)),
    Kind((2, 2), (None, 3), (1, 1)),
    Kind((2,), (3,)),
    Kind((2, 1), (4, None), (1, 2)),
    Kind((2, 4), (None, 3)),
    Kind((2, 2, 2), (None, 1, 5), (3, 1, 1)),
    Kind((4,)),
    Kind((1,)),
    Kind((4, 1), (6, 2)),
    Kind((2, 2)),
]
MAX_STEP_TOKENS = 6


@define(eq=False)
class Live:
    """A sequence with blocks, and what the oracle knows of it."""

    sequence: Sequence
    root: int  # stands for salt and cache reset: contents of another root must never be read

    def contents(self) -> list[int]:
        """Return what the computed slots must hold: each depends on all before it."""
        found, before = [], self.root
        for token_id in self.sequence.token_ids[: self.sequence.num_computed_tokens]:
            before = hash((before, token_id))
            found.append(before)
        return found


class BlockManagerMachine(RuleBasedStateMachine):
    """Admits, computes, forks, follows, preempts, frees, evicts, resets; compares every read."""

    def __init__(self) -> None:
        super().__init__()
        FlakyPool.empty = False
        self.live: list[Live] = []
        self.preempted: list[Sequence] = []
        self.detached: list[BlockTables] = []
        self.memory: dict[Slot, int] = {}
        self.is_collected: dict[Slot, bool] = {}
        self.generation = 0
        self.next_id = 0

    @initialize(
        kind=st.sampled_from(KINDS),
        num_blocks=st.integers(5, 18),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, kind: Kind, num_blocks: int, caching: bool) -> None:
        """Draw the groups."""
        self.manager = BlockManager(
            kind.groups(num_blocks), enable_prefix_caching=caching, max_step_tokens=MAX_STEP_TOKENS
        )
        for pool in self.manager.pools:
            pool.__class__ = FlakySlabPool if isinstance(pool, SlabPool) else FlakyPool
        if self.manager.slabs is not None:
            self.manager.slabs.__class__ = FlakySlabs

    # Few rules with choices inside: Hypothesis leaves out some rules in each example.

    @rule(
        prompt=PROMPTS, salt=st.sampled_from(["", "", "tenant"]), until=st.sampled_from([2, 1, 0])
    )
    def submit(self, prompt: list[int], salt: str, until: int) -> None:
        """Admit a new sequence, which may hit the cache; compute it; collect the step.

        Where it does not fit, the oldest sequence ends, so that examples do not get stuck.
        """
        if not self._admit(self._sequence(prompt, salt), headroom=0):
            if self.live:
                self.manager.give_back(self.manager.detach(self.live.pop(0).sequence))
            return
        if until > 0:
            self._compute(self.live[-1], len(prompt))
        if until > 1:
            self._collect(self.live[-1].sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_tokens=st.integers(0, 6), token_id=st.sampled_from([None, 0, 1]))
    def go_on(self, data: st.DataObject, num_tokens: int, token_id: int | None) -> None:
        """Compute some tokens of a sequence, or collect its steps; maybe append a token."""
        live = data.draw(st.sampled_from(self.live))
        if num_tokens:
            self._compute(live, num_tokens)
        else:
            self._collect(live.sequence)
        if token_id is not None:
            live.sequence.token_ids.append(token_id)
            live.sequence.num_tokens += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data(), back=st.integers(0, 2))
    def leave_behind(self, data: st.DataObject, back: int) -> None:
        """Free what a sequence does not read any more; steps of `back` tokens are in flight."""
        sequence = data.draw(st.sampled_from(self.live)).sequence
        position = max(0, sequence.num_computed_tokens - back)
        self.manager.leave_behind(sequence, position)
        for group, window in self.manager.windows:
            table, size = sequence.block_tables[group], self.manager.groups[group].block_size
            kept = [n for n, block in enumerate(table) if block]
            first = max(0, position - window + 1) // size
            assert kept == list(range(max(first, kept[0] if kept else first), len(table)))
            if back == 0:
                most = -(-(window - 2 + MAX_STEP_TOKENS) // size) + 1
                assert len(kept) <= most, f"{sequence} holds more than {most}"

    @precondition(lambda self: self.live)
    @rule(data=st.data(), extra=st.integers(0, 3))
    def fork(self, data: st.DataObject, extra: int) -> None:
        """Let a new sequence share some of what another has computed."""
        parent = data.draw(st.sampled_from(self.live))
        shared = data.draw(st.integers(0, parent.sequence.num_computed_tokens))
        tokens = parent.sequence.token_ids[:shared] + [extra % 2] * (1 + extra)
        if not self.manager.can_fork(parent.sequence, shared):
            return
        child = self._sequence(tokens, parent.sequence.request.cache_salt)
        self.manager.fork(parent.sequence, child, num_computed_tokens=shared)
        self.live.append(Live(child, parent.root))

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data(), token_id=st.sampled_from([0, 1]))
    def follow(self, data: st.DataObject, token_id: int) -> None:
        """Let a sequence give up what it has and go on from where another stands, as beams do."""
        child, parent = data.draw(st.permutations(self.live))[:2]
        old, new = child.sequence, parent.sequence
        if old.request.cache_salt != new.request.cache_salt:
            return
        before = [list(table) for table in old.block_tables]
        first = self.manager.follow(old, new)
        for was, now, begin in zip(before, old.block_tables, first, strict=True):
            assert was[:begin] == now[:begin]
            assert was[begin : begin + 1] != now[begin : begin + 1] or begin >= len(was)
        old.token_ids = [*new.token_ids, token_id]
        old.num_tokens = len(old.token_ids)
        old.digests = [list(chain) for chain in new.digests]
        child.root = parent.root

    @precondition(lambda self: self.live)
    @rule(data=st.data(), how=st.sampled_from(["ends", "ends in flight", "is preempted"]))
    def leave(self, data: st.DataObject, how: str) -> None:
        """End or preempt a sequence; its blocks come back now, or when steps are collected."""
        live = data.draw(st.sampled_from(self.live))
        self.live.remove(live)
        tables = self.manager.detach(live.sequence)
        if how == "is preempted":
            live.sequence.num_computed_tokens = 0
            self.preempted.append(live.sequence)
        if how == "ends in flight":
            self.detached.append(tables)
        else:
            self.manager.give_back(tables)

    @precondition(lambda self: self.preempted or self.detached)
    @rule(headroom=st.integers(0, 2))
    def come_back(self, headroom: int) -> None:
        """Resume a preempted sequence; take back blocks that waited for a step."""
        if self.detached:
            self.manager.give_back(self.detached.pop(0))
        if self.preempted and self._admit(self.preempted[0], headroom):
            self.preempted.pop(0)

    @rule(what=st.sampled_from(["fail", "reset in flight", "evict", "reset"]), prompt=PROMPTS)
    def disturb(self, what: str, prompt: list[int]) -> None:
        """Evict everything, reset the cache, or let the next allocation fail."""
        if what == "evict":
            self._evict_everything()
        elif what == "fail":
            self._fail_next_allocation(prompt)
        else:
            self.manager.reset_prefix_cache()
            self.generation += 1  # as after a change of weights: nothing older may be hit
            for live in self.live if what == "reset in flight" else ():
                self._collect(live.sequence)

    def _evict_everything(self) -> None:
        for pool in self.manager.pools:
            pool.give_back(pool.take(pool.num_free))
            assert pool.cache.num_idle == 0
        assert self.manager.slabs is None or not self.manager.slabs.idle

    def _fail_next_allocation(self, prompt: list[int]) -> None:
        FlakyPool.empty = True
        try:
            assert not self._admit(self._sequence(prompt, ""), headroom=0)
        finally:
            FlakyPool.empty = False

    def _sequence(self, token_ids: list[int], salt: str) -> Sequence:
        self.next_id += 1
        request = Request(
            request_id=str(self.next_id),
            prompt_token_ids=tuple(token_ids),
            params=PARAMS,
            max_tokens=99,
            seed=0,
            cache_salt=salt,
        )
        sequence = Sequence(self.next_id, request, 0, 99)
        sequence.token_ids = list(token_ids)
        return sequence

    def _admit(self, sequence: Sequence, headroom: int) -> bool:
        before = self._snapshot()
        if not self.manager.admit(sequence, headroom=headroom):
            assert self._snapshot() == before, "a failed admission changed something"
            assert not sequence.block_tables
            return False
        root = hash((sequence.request.cache_salt == "tenant", self.generation))
        cached = sequence.num_computed_tokens
        assert cached < sequence.num_tokens, "a hit covers the last token"
        assert all(pool.num_free >= headroom for pool in self.manager.pools)
        for slot, _ in self._reads(sequence):
            assert self.is_collected[slot], f"{slot} is hit before its step is collected"
        self.live.append(Live(sequence, root))
        return True

    def _compute(self, live: Live, num_tokens: int) -> None:
        sequence = live.sequence
        num_tokens = min(num_tokens, MAX_STEP_TOKENS)
        end = min(sequence.num_tokens, sequence.num_computed_tokens + num_tokens)
        before, tables = self._snapshot(), [list(table) for table in sequence.block_tables]
        reservation = self.manager.reserve(sequence, end)
        if reservation is None:
            assert self._snapshot() == before, "a failed reservation changed something"
            assert sequence.block_tables == tables
            return
        for group, source, destination in reservation.copies:
            for offset in range(self.manager.groups[group].block_size):
                content = self.memory.get((group, source, offset), 0)
                self._store((group, destination, offset), content)
        start, sequence.num_computed_tokens = sequence.num_computed_tokens, end
        contents = live.contents()
        for position in range(start, end):
            for slot in self._slots(sequence, position):
                self._write(sequence, slot, contents[position])

    def _write(self, writer: Sequence, slot: Slot, content: int) -> None:
        group, block, _ = slot
        for other in self.live:
            shares = other.sequence is not writer and block in other.sequence.block_tables[group]
            assert not shares, f"{slot} is written and {other.sequence} reads it"
        assert not self.manager.pools[group].cache.holds(block), f"{slot} is written and cached"
        self._store(slot, content)

    def _store(self, slot: Slot, content: int) -> None:
        """Write a slot; what other groups have in its slab is lost."""
        group, block, _ = slot
        assert block > 0, f"{slot} is nobody's and written"
        if self.manager.slabs is not None:
            strides = [g.block_stride for g in self.manager.groups]
            slab = block % strides[group]
            for other in [s for s in self.memory if s[0] != group]:
                if other[1] % strides[other[0]] == slab:
                    del self.memory[other]
        self.memory[slot] = content
        self.is_collected[slot] = False

    def _collect(self, sequence: Sequence) -> None:
        num_collected = sequence.num_computed_tokens
        for position in range(num_collected):
            self.is_collected.update(dict.fromkeys(self._slots(sequence, position), True))
        if num_collected >= sequence.next_commit_at:
            self.manager.commit(sequence, num_collected)
            assert sequence.next_commit_at > num_collected

    @invariant()
    def blocks_are_counted(self) -> None:
        """Every block is free, idle, or owned by as many tables as its count says."""
        if hasattr(self, "manager"):
            tables = [live.sequence.block_tables for live in self.live]
            check_pools(self.manager, [*tables, *self.detached])

    @invariant()
    def every_read_is_right(self) -> None:
        """What a sequence reads through its tables is what it would have computed alone."""
        for live in self.live:
            contents = live.contents()
            for slot, position in self._reads(live.sequence):
                found = self.memory.get(slot)
                assert found == contents[position], f"{live.sequence} reads {slot} stale"

    def teardown(self) -> None:
        """End everything: no block is left in use."""
        for live in self.live:
            self.manager.give_back(self.manager.detach(live.sequence))
        for tables in self.detached:
            self.manager.give_back(tables)
        assert not hasattr(self, "manager") or self.manager.usage == 0

    def _slots(self, sequence: Sequence, position: int) -> list[Slot]:
        return [
            (g, sequence.block_tables[g][position // group.block_size], position % group.block_size)
            for g, group in enumerate(self.manager.groups)
        ]

    def _reads(self, sequence: Sequence) -> list[tuple[Slot, int]]:
        """Return the slots that the next token reads, with their positions."""
        end = sequence.num_computed_tokens
        found = []
        for g, group in enumerate(self.manager.groups):
            first = 0 if group.window is None else max(0, end - group.window + 1)
            found += [(self._slots(sequence, p)[g], p) for p in range(first, end)]
        return found

    def _snapshot(self) -> Any:
        slabs = self.manager.slabs
        pools = [
            (
                dict(p.num_tables) if isinstance(p, SlabPool) else list(p.num_tables),
                list(p._spare if isinstance(p, SlabPool) else p._free),
                list(p.cache._idle),
                dict(p.cache._block_ids),
            )
            for p in self.manager.pools
        ]
        return pools, slabs and (list(slabs.free), list(slabs.idle))


def run_machine(max_examples: int, phases: Iterable[Phase] = tuple(Phase)) -> None:
    """Run the machine; the same examples each time, so that a failure can be run again."""
    run_state_machine_as_test(
        BlockManagerMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_block_manager_keeps_its_invariants_under_random_use() -> None:
    run_machine(max_examples=100)
