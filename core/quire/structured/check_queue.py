"""Grammars that wait to be checked, handed to several children."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterable, Sequence

from quire.constraints import GrammarSource

# Of grammars that are sent while a child works: they have to fit into a pipe that nobody reads.
# A child that waited for each would stand still while this process's threads wait for a turn.
AHEAD_CHARS, MOST_AHEAD = 2**12, 8


class CheckQueue:
    """Hands each grammar to one child; safe for threads."""

    def __init__(self, sources: Iterable[GrammarSource], num_children: int) -> None:
        self._left = deque(sources)
        self._num_children = num_children
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self, sent: Collection[GrammarSource]) -> list[GrammarSource]:
        """Return what a child is sent next, which has yet to answer those that were sent.

        Of many some at once, the last ones one by one.
        """
        with self._lock:
            most = min(1 + len(self._left) // (2 * self._num_children), MOST_AHEAD)
            if len(sent) > most // 2:
                return []
            taken: list[GrammarSource] = []
            num_chars = sum(len(source.text) for source in sent)
            while self._left and len(sent) + len(taken) < most:
                num_chars += len(self._left[0].text)
                if (sent or taken) and num_chars > AHEAD_CHARS:
                    break
                taken.append(self._left.popleft())
            return taken

    def give_back(self, sources: Sequence[GrammarSource]) -> None:
        """Put back what a child was sent and never began."""
        with self._lock:
            self._left.extendleft(reversed(sources))
