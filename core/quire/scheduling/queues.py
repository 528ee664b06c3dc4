"""Sequences in order of standing: those that run and those that wait."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from quire.scheduling.sequence import Sequence, SequenceStatus


def _standing(sequence: Sequence) -> tuple[int, int]:
    return sequence.standing


class SequenceList:
    """A list kept in order of standing, best first; no two sequences stand equal."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.items)

    def add(self, sequence: Sequence) -> None:
        """Insert by standing; a new arrival usually goes to the end, at no cost."""
        insort(self.items, sequence, key=_standing)

    def victim_for(self, needy: Sequence) -> Sequence:
        """Return the worst standing that may be preempted for `needy`: that one or a later one.

        A sequence that was resumed keeps its blocks until it has a token, so that no sequence
        goes round preemption and resumption without getting on.
        """
        for sequence in reversed(self.items):
            if sequence is needy or not sequence.owes_a_token:
                return sequence
        raise AssertionError(f"{needy} is not running")

    def remove(self, sequence: Sequence) -> None:
        """Take out one sequence, which must be in the list."""
        place = bisect_left(self.items, sequence.standing, key=_standing)
        assert self.items[place] is sequence, f"{sequence} is not in its list"
        del self.items[place]


class WaitingQueue:
    """The sequences without a row: a queue by standing, and siblings that wait to fork.

    Siblings are held back outside the queue, where they block nobody, until the first sequence
    of their request has its prompt computed or cannot be forked any more.
    """

    __slots__ = ("_queue", "_siblings")

    def __init__(self) -> None:
        self._queue = SequenceList()
        self._siblings: dict[int, list[Sequence]] = {}  # by the first one's sequence id

    def __len__(self) -> int:
        return len(self._queue) + sum(map(len, self._siblings.values()))

    def first(self) -> Sequence | None:
        """Return the sequence of best standing in the queue."""
        return self._queue.items[0] if self._queue.items else None

    def add(self, sequence: Sequence) -> None:
        """Queue one sequence by its standing."""
        self._queue.add(sequence)

    def add_family(self, sequences: list[Sequence]) -> None:
        """Queue the first of a request's sequences and hold the others back to fork from it."""
        first, *siblings = sequences
        self._queue.add(first)
        for sibling in siblings:
            sibling.status = SequenceStatus.WAITING_TO_FORK
            sibling.parent = first
        if siblings:
            first.num_to_fork = len(siblings)
            self._siblings[first.sequence_id] = siblings

    def has_siblings_of(self, first: Sequence) -> bool:
        """Whether sequences wait to fork from this one."""
        return first.sequence_id in self._siblings

    def release_siblings_of(self, first: Sequence) -> None:
        """Queue those that wait to fork from this one, if any: now they can, or never will."""
        for sibling in self._siblings.pop(first.sequence_id, ()):
            sibling.status = SequenceStatus.WAITING
            self._queue.add(sibling)

    def remove(self, sequence: Sequence) -> None:
        """Take out one sequence, queued or held back."""
        if sequence.parent is not None:
            sequence.parent.num_to_fork -= 1
        if sequence.status is not SequenceStatus.WAITING_TO_FORK:
            self._queue.remove(sequence)
            return
        assert sequence.parent is not None, f"{sequence} waits to fork from nobody"
        siblings = self._siblings[sequence.parent.sequence_id]
        siblings.remove(sequence)
        if not siblings:
            del self._siblings[sequence.parent.sequence_id]
