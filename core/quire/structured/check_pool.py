"""The children that compile grammars first: several to work, and so one to spare."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar


class Process(Protocol):
    """A child that may be ended from outside."""

    @property
    def pid(self) -> int:
        """The child's process id."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether it may be asked."""
        ...

    def close(self) -> None:
        """End the child."""
        ...


AnyProcess = TypeVar("AnyProcess", bound=Process)


class CheckPool(Generic[AnyProcess]):
    """Lends children, at most `size` at a time, and keeps as many; safe for threads.

    The first is started when it is asked for, or `prepare` is called. Once one was lent, the others
    are started side by side, so that nobody waits after a child was killed.
    """

    def __init__(self, start: Callable[[], AnyProcess], size: int) -> None:
        self._start = start
        self._size = size
        self._wanted = 1  # the size, once one was lent
        self._idle: list[AnyProcess] = []
        self._slots = threading.BoundedSemaphore(size)
        self._changed = threading.Condition()
        self._num_lent = 0
        self._num_coming = 0  # that are being started to spare
        self._is_closed = False

    @property
    def pids(self) -> list[int]:
        """The process ids of children that wait for work."""
        return [process.pid for process in self._idle]

    @contextlib.contextmanager
    def lend(self) -> Iterator[AnyProcess]:
        """Lend a child. Raises: what starting one raises."""
        with self.lend_while(lambda: True) as process:
            assert process is not None, "it is wanted"
            yield process

    @contextlib.contextmanager
    def lend_while(self, is_wanted: Callable[[], bool]) -> Iterator[AnyProcess | None]:
        """Lend a child, or None where none is wanted any more before one is free or has started.

        Raises: what starting one raises.
        """
        with self._slots:
            process = self._take(is_wanted)
            try:
                yield process
            finally:
                if process is not None:
                    self._put(process)

    def prepare(self) -> None:
        """Begin to start the first child, in a thread."""
        with self._changed:
            self._is_closed = False
        self._start_spares()

    def wait(self) -> None:
        """Wait until no child is being started."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_coming)

    def close(self) -> None:
        """End all children that are idle, and those that are being started."""
        with self._changed:
            self._is_closed = True
            processes, self._idle = self._idle, []
        for process in processes:
            process.close()

    def _take(self, is_wanted: Callable[[], bool]) -> AnyProcess | None:
        with self._changed:
            self._is_closed = False
            self._wanted = self._size
            while (kept := self._alive()) is None and self._num_coming and is_wanted():
                self._changed.wait()
            if kept is None and not is_wanted():
                return None
            self._num_lent += 1
        if kept is None:
            try:
                kept = self._start()
            except BaseException:
                with self._changed:
                    self._num_lent -= 1
                raise
        self._start_spares()
        return kept

    def _alive(self) -> AnyProcess | None:
        """Return an idle child that is alive; those that are not are forgotten."""
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            process.close()
        return None

    def _put(self, process: AnyProcess) -> None:
        with self._changed:
            self._num_lent -= 1
            is_kept = process.is_alive and not self._is_closed
            if is_kept:
                self._idle.append(process)
            self._changed.notify_all()
        if not is_kept:
            process.close()
            self._start_spares()

    def _start_spares(self) -> None:
        with self._changed:
            num_kept = len(self._idle) + self._num_lent + self._num_coming
            missing = 0 if self._is_closed else max(self._wanted - num_kept, 0)
            self._num_coming += missing
        for _ in range(missing):
            threading.Thread(target=self._add_spare, name="grammar-spare", daemon=True).start()

    def _add_spare(self) -> None:
        try:
            process = self._start()
        except Exception:  # noqa: BLE001  whoever needs one next tries again, and is told
            process = None
        with self._changed:
            self._num_coming -= 1
            is_kept = process is not None and not self._is_closed
            if process is not None and is_kept:
                self._idle.append(process)
            self._changed.notify_all()
        if process is not None and not is_kept:
            process.close()
