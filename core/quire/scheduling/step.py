"""One step on the scheduler's side: filled while it is planned, kept while it is in flight."""

from __future__ import annotations

from collections.abc import Iterable

from quire.scheduling.beam_search import num_candidates
from quire.scheduling.block_manager import Reservation
from quire.scheduling.block_pool import BlockTables
from quire.scheduling.output import AddedSequence, SchedulerOutput
from quire.scheduling.sequence import Sequence


class Step:
    """What one step computes, and what has to happen when its result is collected."""

    __slots__ = (
        "added",
        "admits",
        "beams",
        "block_copies",
        "chosen_token_ids",
        "chunks",
        "new_block_ids",
        "num_spare_tokens",
        "prompts_done",
        "releases",
        "resumed",
        "sampled",
        "singles",
        "step_id",
        "table_changes",
        "unfinished_chunks",
    )

    def __init__(self, step_id: int) -> None:
        self.step_id = step_id
        self.num_spare_tokens = 0  # of the budget, beyond one for each running sequence to come
        self.admits = True  # False once a running sequence was short of blocks
        self.singles: dict[int, int] = {}  # sequence id -> 1
        self.chunks: dict[int, int] = {}  # sequence id -> tokens, where they are several
        self.added: list[AddedSequence] = []
        self.resumed: list[AddedSequence] = []
        self.new_block_ids: dict[int, list[list[int]]] = {}
        self.block_copies: list[tuple[int, int, int]] = []
        self.chosen_token_ids: dict[int, int] = {}
        self.table_changes: dict[int, list[tuple[int, int, list[int]]]] = {}
        self.prompts_done: list[Sequence] = []  # whose siblings may fork from the next step on

        # Read when the step is collected.
        self.sampled: list[Sequence] = []  # get a token
        self.beams: list[Sequence] = []  # say what their next tokens may be
        self.unfinished_chunks: list[tuple[Sequence, int]] = []  # computed up to here, no token
        self.releases: list[BlockTables] = []  # blocks that wait for this step

    @property
    def is_empty(self) -> bool:
        """Whether nothing is computed."""
        return not self.singles and not self.chunks

    def is_short_for(self, sequence: Sequence) -> bool:
        """Whether a sequence that is computed whole has to wait for a step with more room."""
        pooling = sequence.request.pooling
        is_whole = pooling is not None and pooling.is_whole
        return is_whole and sequence.num_tokens > self.num_spare_tokens

    def num_scheduled_tokens(self, sequence: Sequence) -> int:
        """Return how many of the sequence's tokens this step computes."""
        sequence_id = sequence.sequence_id
        return self.singles.get(sequence_id) or self.chunks.get(sequence_id, 0)

    def add_sequence(self, sequence: Sequence, row: int, *, is_new: bool) -> None:
        """Tell the runner of a sequence that takes a row."""
        request = sequence.request
        added = AddedSequence(
            sequence_id=sequence.sequence_id,
            request_id=sequence.request_id,
            index=sequence.index,
            row=row,
            token_ids=list(sequence.token_ids),
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_computed_tokens=sequence.num_computed_tokens,
            block_tables=[list(table) for table in sequence.block_tables],
            params=request.params,
            seed=request.seed,
            stop_token_ids=request.stop_token_ids,
            num_candidates=0 if sequence.beams is None else num_candidates(request),
            bad_words_token_ids=request.bad_words_token_ids,
            pooling=request.pooling,
        )
        (self.added if is_new else self.resumed).append(added)

    def add_blocks(self, sequence: Sequence, reservation: Reservation) -> None:
        """Tell the runner of new blocks at the ends of a running sequence's tables."""
        assert not reservation.copies, f"{sequence} runs and writes to a shared block"
        self.new_block_ids[sequence.sequence_id] = reservation.new_block_ids

    def add_copies(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copy blocks before the step: all at once, so none is copied from another's copy."""
        origins = {(group, copy): source for group, source, copy in self.block_copies}
        for group, source, copy in copies:
            self.block_copies.append((group, origins.get((group, source), source), copy))

    def to_output(self, *, finished: list[int], preempted: list[int]) -> SchedulerOutput:
        """Return the difference for the runner; sequences with one token come first."""
        samples = {sequence.sequence_id for sequence in self.sampled}
        samples.update([beam.sequence_id for beam in self.beams])
        return SchedulerOutput(
            step_id=self.step_id,
            added=self.added,
            resumed=self.resumed,
            finished=finished,
            preempted=preempted,
            new_block_ids=self.new_block_ids,
            block_copies=self.block_copies,
            table_changes=self.table_changes,
            chosen_token_ids=self.chosen_token_ids,
            num_scheduled_tokens={**self.singles, **self.chunks},
            samples=samples,
        )
