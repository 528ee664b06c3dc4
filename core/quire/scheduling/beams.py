"""The sequences of beam searches: how they wait for each other, move, share blocks and end.

A beam is a sequence with a row and blocks of its own. It is never scheduled ahead: its next token
is chosen when the step is collected and all beams of its request have come as far.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from attrs import Factory, define, evolve

from quire.request import FinishReason, Request, SequenceUpdate, TokenLogprobs
from quire.scheduling.beam_search import BeamSearch, Hypothesis, Move
from quire.scheduling.block_manager import BlockManager, Reservation
from quire.scheduling.output import StepResult
from quire.scheduling.queues import SequenceList, WaitingQueue
from quire.scheduling.sequence import Sequence, SequenceStatus
from quire.scheduling.step import Step

FINISHED = SequenceStatus.FINISHED
PARKED = SequenceStatus.PARKED
PREEMPTED = SequenceStatus.PREEMPTED


@define(eq=False)
class BeamGroup:
    """The beams of one request by slot, and what those said that wait for the others."""

    search: BeamSearch
    slots: list[Sequence]
    results: dict[int, TokenLogprobs] = Factory(dict)

    def has_result(self, sequence: Sequence) -> bool:
        """Whether a beam waits for the others."""
        return sequence.index in self.results


class Beams:
    """Leads the beams of all requests for their scheduler, which lends its queue and its ends.

    `requests` are the scheduler's unfinished sequences; `preempt` and `finish` its own.
    """

    def __init__(
        self,
        blocks: BlockManager,
        waiting: WaitingQueue,
        requests: dict[str, list[Sequence]],
        preempt: Callable[[Sequence], None],
        finish: Callable[[Sequence, FinishReason], None],
    ) -> None:
        self._blocks = blocks
        self._waiting = waiting
        self._requests = requests
        self._preempt = preempt
        self._finish = finish
        # What the runner has not heard of, of sequences that have a row.
        self._changed: dict[int, tuple[Sequence, list[int]]] = {}  # from where, by group
        self._chosen: dict[int, int] = {}

    def begin(self, first: Sequence) -> None:
        """Make the first sequence of a request that asks for a beam search its first beam."""
        if first.request.params.beam_search is None:
            return
        max_generated = first.max_num_tokens - first.num_prompt_tokens
        first.beams = BeamGroup(BeamSearch(first.request, max_generated), [first])

    # A step is planned

    def add_blocks(self, sequence: Sequence, reservation: Reservation, step: Step) -> None:
        """Take down what a running sequence, perhaps a beam, got to write to."""
        if sequence.beams is None:
            step.add_blocks(sequence, reservation)
            return
        step.add_copies(reservation.copies)
        first = [len(table) for table in sequence.block_tables]
        for group, block_ids in enumerate(reservation.new_block_ids):
            first[group] -= len(block_ids)
        for group, _, destination in reservation.copies:
            first[group] = sequence.block_tables[group].index(destination)
        self._note(sequence, first)

    def _note(self, sequence: Sequence, first: list[int]) -> None:
        _, before = self._changed.get(sequence.sequence_id, (sequence, first))
        self._changed[sequence.sequence_id] = sequence, list(map(min, before, first))

    def forget(self, sequence: Sequence) -> None:
        """A beam gives its row back: the runner need not know of it."""
        self._changed.pop(sequence.sequence_id, None)
        self._chosen.pop(sequence.sequence_id, None)

    def tell(self, step: Step) -> None:
        """Put into a step what the runner has not heard of."""
        step.chosen_token_ids, self._chosen = self._chosen, {}
        for sequence_id, (sequence, first) in self._changed.items():
            tables = zip(sequence.block_tables, first, strict=True)
            changes = [
                (group, begin, table[begin:])
                for group, (table, begin) in enumerate(tables)
                if begin < len(table)
            ]
            if changes:
                step.table_changes[sequence_id] = changes
        self._changed.clear()

    def waits(self, sequence: Sequence) -> bool:
        """Whether a beam has said what its next token may be and waits for the others."""
        return sequence.beams is not None and sequence.beams.has_result(sequence)

    def in_the_way(self, running: SequenceList) -> Sequence | None:
        """Return the worst standing that runs beside the request of the first one that waits.

        Where there is none, the worst of its own beams that waits for it: behind windows a beam
        cannot always share what the others have, and needs blocks of its own.
        """
        needy = self._waiting.first()
        if needy is None:
            return None
        others = [sequence for sequence in running if sequence.request is not needy.request]
        others = others or [sequence for sequence in running if self.waits(sequence)]
        return others[-1] if others else None

    def parks(self, sequence: Sequence) -> bool:
        """Whether a beam that was preempted waits for the others, not for blocks."""
        if not self.waits(sequence):
            return False
        sequence.status = PARKED
        return True

    def find_parent(self, sequence: Sequence, step: Step) -> tuple[Sequence, int] | None:
        """Return the running beam that shares most with one that waits, and how many tokens.

        Only what earlier steps compute counts, since this one's copies come before it.
        """
        best: tuple[Sequence, int] | None = None
        if sequence.beams is None:
            return None
        for other in sequence.beams.slots:
            if other.row is None:
                continue
            num_computed = other.num_computed_tokens - step.num_scheduled_tokens(other)
            shared = min(_num_shared(other, sequence), num_computed, sequence.num_tokens - 1)
            if not self._blocks.can_fork(other, shared):
                continue  # its window has left behind what they share
            if best is None or shared > best[1]:
                best = other, shared
        return best

    # A step is collected

    def update(self, step: Step, result: StepResult) -> list[SequenceUpdate]:
        """Take what a step says of its beams; those move on whose siblings have come as far."""
        groups: dict[str, BeamGroup] = {}
        updates: list[SequenceUpdate] = []
        for sequence in step.beams:
            if sequence.status is FINISHED:
                continue
            group = sequence.beams
            assert group is not None, f"{sequence} is no beam"
            if sequence.sequence_id in result.errors:
                updates += self._fail(group, result.errors[sequence.sequence_id])
                continue
            group.results[sequence.index] = result.logprobs[sequence.sequence_id]
            groups[sequence.request_id] = group
            if sequence.status is PREEMPTED:
                self._waiting.remove(sequence)
                sequence.status = PARKED
            elif len(sequence.token_ids) >= sequence.next_commit_at:
                self._blocks.commit(sequence, len(sequence.token_ids))
        for group in groups.values():
            if len(group.results) == len(group.slots) and group.slots[0].status is not FINISHED:
                updates += self._advance(group)
        return updates

    def _advance(self, group: BeamGroup) -> list[SequenceUpdate]:
        results = [group.results[slot] for slot in range(len(group.slots))]
        group.results.clear()
        moves = group.search.advance(results)
        if not moves:
            return self._end(group)
        # All copies of what parents have come before any parent goes on.
        for move in moves:
            if move.slot != move.parent:
                self._follow(group, move)
        for move in moves:
            self._go_on(group.slots[move.slot], move.token_id)
        return []

    def _follow(self, group: BeamGroup, move: Move) -> None:
        """Let a slot go on from where another stands."""
        parent = group.slots[move.parent]
        if move.slot == len(group.slots):
            self._add_slot(group, parent)
        child = group.slots[move.slot]
        if child.row is not None and parent.row is not None:
            self._note(child, self._blocks.follow(child, parent))
        elif child.row is not None:
            self._preempt(child)
        child.token_ids = list(parent.token_ids)
        child.digests = [list(chain) for chain in parent.digests]
        child.missing_blocks = None

    def _add_slot(self, group: BeamGroup, parent: Sequence) -> None:
        first, index = group.slots[0], len(group.slots)
        sequence_id = first.sequence_id + index
        child = Sequence(sequence_id, first.request, index, first.max_num_tokens)
        child.standing = (first.standing[0], sequence_id)
        child.num_tokens = parent.num_tokens
        child.num_cached_tokens = first.num_cached_tokens
        child.beams = group
        child.status = PARKED
        group.slots.append(child)
        self._requests[first.request_id].append(child)

    def _go_on(self, sequence: Sequence, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        if sequence.row is not None:
            self._chosen[sequence.sequence_id] = token_id
        elif sequence.status is PARKED:
            sequence.status = PREEMPTED
            self._waiting.add(sequence)

    def _end(self, group: BeamGroup) -> list[SequenceUpdate]:
        request, num_cached = group.slots[0].request, group.slots[0].num_cached_tokens
        found = group.search.done[: request.params.n]
        assert len(found) == request.params.n, f"{request.request_id} found {len(found)}"
        for sequence in list(group.slots):
            self._finish(sequence, FinishReason.STOP)
        return [_update(request, index, done, num_cached) for index, done in enumerate(found)]

    def _fail(self, group: BeamGroup, error: str) -> list[SequenceUpdate]:
        request = group.slots[0].request
        for sequence in list(group.slots):
            self._finish(sequence, FinishReason.ERROR)
        return [
            SequenceUpdate(
                request_id=request.request_id,
                index=index,
                finish_reason=FinishReason.ERROR,
                error=error,
            )
            for index in range(request.params.n)
        ]


def _num_shared(one: Sequence, other: Sequence) -> int:
    """Return how many tokens two beams of a request have in common, their prompt included."""
    begin = one.num_prompt_tokens
    pairs = zip(one.token_ids[begin:], other.token_ids[begin:], strict=False)
    return begin + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _update(request: Request, index: int, done: Hypothesis, num_cached: int) -> SequenceUpdate:
    links = done.link.chain()
    last = links[-1].token_id
    is_users = done.reason is FinishReason.STOP and last not in request.eos_token_ids
    num_top = request.params.logprobs or 0
    return SequenceUpdate(
        request_id=request.request_id,
        index=index,
        token_ids=tuple(link.token_id for link in links),
        finish_reason=done.reason,
        stop_reason=last if is_users else None,
        num_cached_tokens=num_cached,
        logprobs=tuple(
            evolve(
                link.logprobs,
                top_ids=link.logprobs.top_ids[:num_top],
                top_logprobs=link.logprobs.top_logprobs[:num_top],
            )
            for link in links
        ),
    )
