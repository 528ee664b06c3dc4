"""Queues by standing, and siblings that are held back."""

from __future__ import annotations

from builders import make_request

from quire.scheduling.queues import SequenceList, WaitingQueue
from quire.scheduling.sequence import Sequence, SequenceStatus


def make(sequence_id: int, rank: int = 0) -> Sequence:
    sequence = Sequence(sequence_id, make_request("r", [1, 2]), sequence_id, 10)
    sequence.standing = (rank, sequence_id)
    return sequence


def test_list_keeps_the_order_of_standing() -> None:
    sequences = SequenceList()
    for sequence_id, rank in [(1, 0), (2, -5), (3, 0), (0, 7)]:
        sequences.add(make(sequence_id, rank))

    assert [sequence.sequence_id for sequence in sequences] == [2, 1, 3, 0]


def test_list_removes_the_sequence_itself() -> None:
    sequences, middle = SequenceList(), make(2)
    for sequence in (make(1), middle, make(3)):
        sequences.add(sequence)

    sequences.remove(middle)

    assert [sequence.sequence_id for sequence in sequences] == [1, 3]


def test_queue_holds_siblings_back_until_they_are_released() -> None:
    queue, family = WaitingQueue(), [make(0), make(1), make(2)]
    queue.add_family(family)
    queue.remove(family[0])

    assert queue.first() is None
    assert len(queue) == 2
    queue.release_siblings_of(family[0])
    assert queue.first() is family[1]
    assert family[1].status is SequenceStatus.WAITING


def test_queue_forgets_a_family_when_its_last_sibling_is_removed() -> None:
    queue, family = WaitingQueue(), [make(0), make(1), make(2)]
    queue.add_family(family)

    queue.remove(family[2])
    queue.remove(family[1])

    assert not queue.has_siblings_of(family[0])
    assert len(queue) == 1
