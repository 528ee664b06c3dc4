"""Grammars handed to children: each once, some ahead while there are many, and nobody is stuck."""

from __future__ import annotations

import threading

from quire.constraints import GrammarKind, GrammarSource
from quire.structured.check_pool import CheckPool
from quire.structured.check_queue import AHEAD_CHARS, MOST_AHEAD, CheckQueue


def sources(count: int, length: int = 1) -> list[GrammarSource]:
    return [GrammarSource(kind=GrammarKind.REGEX, text=f"{i:03}" * length) for i in range(count)]


def test_many_are_taken_at_once_and_the_last_ones_one_by_one() -> None:
    given = sources(64)
    queue = CheckQueue(given, 2)
    first = queue.take([])

    found, sizes = list(first), [len(first)]
    while taken := queue.take([]):
        found += taken
        sizes.append(len(taken))

    assert found == given
    assert sizes[0] == MOST_AHEAD
    assert sizes[-2:] == [1, 1]


def test_no_more_is_sent_ahead_than_a_pipe_holds() -> None:
    long = sources(64, AHEAD_CHARS // 8)
    queue = CheckQueue(long, 2)

    assert [len(queue.take(long[-count:] if count else [])) for count in (0, 1, 2, 8)] == [
        2,
        1,
        0,
        0,
    ]


def test_what_is_given_back_comes_next_in_its_order() -> None:
    given = sources(40)
    queue = CheckQueue(given, 2)
    taken = queue.take([])

    queue.give_back(taken[1:])

    assert queue.take([])[: len(taken) - 1] == taken[1:]


class Child:
    """A process that is none."""

    pid = 0

    def __init__(self) -> None:
        self.is_alive = True

    def close(self) -> None:
        self.is_alive = False


def test_who_waits_for_a_child_that_starts_leaves_once_there_is_nothing_to_do() -> None:
    may_start, work = threading.Event(), ["left"]
    lent: list[Child | None] = []

    def start() -> Child:
        if pool._num_coming:
            assert may_start.wait(5)
        return Child()

    def take() -> None:
        with pool.lend_while(lambda: bool(work)) as child:
            lent.append(child)

    pool = CheckPool(start, 2)
    waiting = threading.Thread(target=take)
    with pool.lend() as child:
        waiting.start()
        work.clear()
        child.close()
    waiting.join(5)

    assert lent == [None]
    may_start.set()
    pool.wait()
    pool.close()


def test_children_that_are_missing_start_side_by_side() -> None:
    together = threading.Barrier(4, timeout=5)

    def start() -> Child:
        if pool._num_coming:
            together.wait()  # none of the three gets on without the others
        return Child()

    pool = CheckPool(start, 4)
    with pool.lend():
        together.wait()
        pool.wait()
        assert len(pool.pids) == 3
    pool.close()
