"""A model runner without a model: simulated KV memory, and tokens that depend on all of it.

The content of a slot is a hash of the content before it, its token and its position, like the
keys and values of a real model; a sampled token is a hash of the contents of all slots, read
through the block tables. So a token that is lost, doubled, reordered, stale or overwritten, and
a block that is found by mistake, changes the answer.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from typing import Any

from attrs import define, field

from quire.request import FinishReason, Request
from quire.scheduling.output import AddedSequence, KVCacheGroup, SchedulerOutput, StepResult

VOCAB_SIZE = 24
Block = tuple[int, int]  # group, block id


def root_content(salt: str) -> int:
    """Return what stands before the first slot, so that a hit across salts is seen."""
    return zlib.crc32(salt.encode())


def next_content(before: int, token_id: int, position: int) -> int:
    """Return the content of a slot."""
    return hash((before, token_id, position))


def contents_of(salt: str, token_ids: Iterable[int]) -> list[int]:
    """Return the contents of the slots of a sequence."""
    before, contents = root_content(salt), []
    for position, token_id in enumerate(token_ids):
        before = next_content(before, token_id, position)
        contents.append(before)
    return contents


def reads_of(contents: Items[int], windows: Items[int | None]) -> list[Items[int]]:
    """Return what each kind of layers reads for the last token."""
    return [contents[-(window or 0) :] for window in windows]


def next_token(reads: Iterable[Items[int]], index: int) -> int:
    """Return what the fake model samples from what each kind of layers reads.

    Sequences of one request differ by `index`.
    """
    return hash((index, *dict.fromkeys(map(tuple, reads)))) % VOCAB_SIZE


def generate_alone(
    request: Request, index: int, max_model_len: int, windows: Items[int | None] = (None,)
) -> tuple[list[int], FinishReason]:
    """Return what a sequence must generate: one request, no blocks, no scheduler."""
    contents = contents_of(request.cache_salt, request.prompt_token_ids)
    generated: list[int] = []
    while True:
        token_id = next_token(reads_of(contents, windows), index)
        generated.append(token_id)
        enough = len(generated) >= request.params.min_tokens
        if token_id in request.stop_token_ids and enough:
            return generated, FinishReason.STOP
        if len(generated) == request.max_tokens or len(contents) + 1 == max_model_len:
            return generated, FinishReason.LENGTH
        contents.append(next_content(contents[-1], token_id, len(contents)))


@define
class RowState:
    """What a runner keeps for a row: it never sees the scheduler's own sequence."""

    added: AddedSequence
    token_ids: list[int]  # the device's: tokens in flight included
    tables: list[list[int]]
    num_computed_tokens: int


@define
class FakeStep:
    """One dispatched step: its result, and the blocks that it names."""

    result: StepResult
    blocks: set[Block] = field(factory=set)


class FakeRunner:
    """Executes each step at dispatch, in the order of dispatch, as a stream does.

    `fails(added, num_computed_tokens)` says why a row fails, or None.
    """

    def __init__(
        self,
        groups: list[KVCacheGroup],
        requests: dict[str, Request],
        *,
        max_num_seqs: int,
        fails: Callable[[AddedSequence, int], str | None],
    ) -> None:
        self.groups = groups
        self.rows: dict[int, RowState] = {}  # by sequence id
        self.in_flight: deque[FakeStep] = deque()
        self._requests = requests
        self._max_num_seqs = max_num_seqs
        self._fails = fails
        self._memory = memory_of(groups)
        self._has_windows = any(group.window is not None for group in groups)
        self._written_in: dict[Block, int] = {}  # the last step that wrote
        self._collected_step_id = 0

    def dispatch(self, output: SchedulerOutput) -> None:
        """Apply the difference, copy blocks, compute, sample."""
        step = FakeStep(StepResult(step_id=output.step_id, token_ids={}, errors={}))
        self._apply_rows(output)
        self._copy_blocks(output, step)
        scheduled = output.num_scheduled_tokens
        counts = list(scheduled.values())
        assert counts == sorted(counts, key=lambda n: n > 1), f"single tokens first: {counts}"
        # Last row first: a row that needs what another computes in this step is seen.
        for sequence_id in reversed(scheduled):
            self._compute(self.rows[sequence_id], scheduled[sequence_id], step)
        for sequence_id in scheduled:
            self._sample(sequence_id, sequence_id in output.samples, step)
        assert output.samples <= scheduled.keys(), "a row is sampled that is not computed"
        self.in_flight.append(step)

    def collect(self) -> StepResult:
        """Return the result of the oldest step in flight."""
        step = self.in_flight.popleft()
        self._collected_step_id = step.result.step_id
        return step.result

    def _apply_rows(self, output: SchedulerOutput) -> None:
        for sequence_id in output.finished + output.preempted:
            del self.rows[sequence_id]
        named = set().union(*(step.blocks for step in self.in_flight))
        taken = {state.added.row for state in self.rows.values()}
        for added in output.added + output.resumed:
            assert 0 <= added.row < self._max_num_seqs, f"row {added.row} does not exist"
            assert added.row not in taken, f"row {added.row} is taken twice"
            taken.add(added.row)
            assert added.sequence_id not in self.rows, f"{added.sequence_id} has a row already"
            self._check_beginning(added)
            self._check_new(self._blocks_from(added), named)
            tables = [list(table) for table in added.block_tables]
            self.rows[added.sequence_id] = RowState(
                added, list(added.token_ids), tables, added.num_computed_tokens
            )
        for sequence_id, new_block_ids in output.new_block_ids.items():
            new = [(g, block) for g, ids in enumerate(new_block_ids) for block in ids]
            self._check_new(new, named)
            for table, ids in zip(self.rows[sequence_id].tables, new_block_ids, strict=True):
                table.extend(ids)

    def _blocks_from(self, added: AddedSequence) -> list[Block]:
        """Return the blocks that the sequence will write to."""
        return [
            (g, block)
            for g, table in enumerate(added.block_tables)
            for block in table[added.num_computed_tokens // self.groups[g].block_size :]
        ]

    def _first_read(self, g: int, position: int) -> int:
        """Return the first position that the token at `position` reads."""
        window = self.groups[g].window
        return 0 if window is None else max(0, position - window + 1)

    def _check_new(self, blocks: list[Block], named: set[Block]) -> None:
        assert not named.intersection(blocks), (
            f"{blocks} are given out, a step in flight reads them"
        )
        assert all(block > 0 for _, block in blocks), "block 0 is never allocated"
        slabs = {(slab_of(self.groups[g], block), g) for g, block in blocks}
        for g, block in named:
            slab = slab_of(self.groups[g], block)
            taken = [h for h in self._groups() if h != g and (slab, h) in slabs]
            assert slab is None or not taken, f"slab {slab} is given to {taken}, {g} reads it"

    def _check_beginning(self, added: AddedSequence) -> None:
        """Check that blocks found in the cache come from steps that have been collected."""
        assert added.num_computed_tokens < len(added.token_ids), "the last token is never cached"
        if added.index > 0 and added.num_computed_tokens == added.num_prompt_tokens - 1:
            return  # a fork shares what is in flight
        for g, group in enumerate(self.groups):
            first = self._first_read(g, added.num_computed_tokens) // group.block_size
            end = added.num_computed_tokens // group.block_size
            for block in added.block_tables[g][first:end]:
                step_id = self._written_in[g, block]
                assert step_id <= self._collected_step_id, f"{block} is hit before it is computed"

    def _copy_blocks(self, output: SchedulerOutput, step: FakeStep) -> None:
        contents = [list(self._memory[g][source]) for g, source, _ in output.block_copies]
        for (g, source, destination), content in zip(output.block_copies, contents, strict=True):
            step.blocks.add((g, destination))
            if not self._has_windows:
                # Copies come before all else of a step: who gets a source that a window has left
                # writes to it later.
                step.blocks.add((g, source))
            for offset, value in enumerate(content):
                self._memory[g][destination][offset] = value
            self._written_in[g, destination] = output.step_id

    def _compute(self, state: RowState, num_tokens: int, step: FakeStep) -> None:
        start, end = state.num_computed_tokens, state.num_computed_tokens + num_tokens
        assert num_tokens > 0, "a row without tokens is scheduled"
        assert end <= len(state.token_ids), "a token is computed before it exists"
        request = self._requests[state.added.request_id]
        limit = len(request.prompt_token_ids) + request.max_tokens
        assert end < limit, f"{end} tokens are computed, the last of {limit} needs no computing"
        contents = self._contents(state, end)
        for g, group in enumerate(self.groups):
            size, table, memory = group.block_size, state.tables[g], self._memory[g]
            first = self._first_read(g, start)
            for position in range(first, start):
                content = memory[table[position // size]][position % size]
                assert content == contents[position], f"P1: group {g} lacks position {position}"
            for position in range(start, end):
                memory[table[position // size]][position % size] = contents[position]
            written = table[start // size : -(-end // size)]
            assert 0 not in written, "block 0 is written"
            self._written_in.update(((g, block), step.result.step_id) for block in written)
            step.blocks.update((g, block) for block in table[first // size : -(-end // size)])
        state.num_computed_tokens = end

    def _contents(self, state: RowState, end: int) -> list[int]:
        """Return what its first `end` slots hold, were it alone."""
        salt = self._requests[state.added.request_id].cache_salt
        return contents_of(salt, state.token_ids[:end])

    def _sample(self, sequence_id: int, is_sampled: bool, step: FakeStep) -> None:
        state = self.rows[sequence_id]
        num_tokens = len(state.token_ids)
        is_last = state.num_computed_tokens == num_tokens
        assert is_sampled == is_last, f"{num_tokens} tokens, sampled: {is_sampled}"
        error = self._fails(state.added, state.num_computed_tokens)
        if error is not None:
            step.result.errors[sequence_id] = error
        if is_sampled:
            reads = [self._read(state, g) for g in self._groups()]
            token_id = next_token(reads, state.added.index)
            state.token_ids.append(token_id)
            step.result.token_ids[sequence_id] = [token_id]

    def _groups(self) -> range:
        return range(len(self.groups))

    def _read(self, state: RowState, g: int) -> list[int]:
        size, memory, table = self.groups[g].block_size, self._memory[g], state.tables[g]
        end = state.num_computed_tokens
        places = range(self._first_read(g, end - 1), end)
        return [memory[table[place // size]][place % size] for place in places]


def slab_of(group: KVCacheGroup, block: int) -> int | None:
    """Return the slab that a block is cut from, None where groups share none."""
    return None if group.blocks_per_slab is None else block % group.block_stride


def memory_of(groups: list[KVCacheGroup]) -> list[Any]:
    """Return each group's blocks by id: lists of slots, cut from the same slabs where they are."""
    if any(group.blocks_per_slab is None for group in groups):
        return [[[0] * g.block_size for _ in range(g.num_blocks)] for g in groups]
    slabs = [Slab() for _ in range(groups[0].num_blocks)]
    return [
        {
            slab + place * group.block_stride: SlabBlock(slabs[slab], g, place, group.block_size)
            for slab in range(group.num_blocks)
            for place in range(group.blocks_per_slab or 1)
        }
        for g, group in enumerate(groups)
    ]


@define
class Slab:
    """Memory that belongs to the group that wrote to it last; what others wrote is lost."""

    group: int = -1
    slots: dict[tuple[int, int], int] = field(factory=dict)


@define
class SlabBlock:
    """A block of a group in a slab, as a list of slots."""

    slab: Slab
    group: int
    place: int
    size: int

    def __getitem__(self, offset: int) -> int:
        if self.slab.group != self.group:
            return 0
        return self.slab.slots.get((self.place, offset), 0)

    def __setitem__(self, offset: int, content: int) -> None:
        if self.slab.group != self.group:
            self.slab.group = self.group
            self.slab.slots.clear()
        self.slab.slots[self.place, offset] = content

    def __iter__(self) -> Iterator[int]:
        return (self[offset] for offset in range(self.size))
