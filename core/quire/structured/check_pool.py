"""The children that compile grammars first: one to work and one to spare, which a start takes."""

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
    are started beside, so that nobody waits after a child was killed.
    """

    def __init__(self, start: Callable[[], AnyProcess], size: int) -> None:
        self._start = start
        self._size = size
        self._wanted = 1  # the size, once one was lent
        self._idle: list[AnyProcess] = []
        self._slots = threading.BoundedSemaphore(size)
        self._changed = threading.Condition()
        self._num_lent = 0
        self._is_spare_coming = False
        self._is_closed = False

    @property
    def pids(self) -> list[int]:
        """The process ids of children that wait for work."""
        return [process.pid for process in self._idle]

    @contextlib.contextmanager
    def lend(self) -> Iterator[AnyProcess]:
        """Lend a child. Raises: what starting one raises."""
        with self._slots:
            process = self._take()
            try:
                yield process
            finally:
                self._put(process)

    def prepare(self) -> None:
        """Begin to start the first child, in a thread."""
        with self._changed:
            self._is_closed = False
        self._start_spare()

    def wait(self) -> None:
        """Wait until no child is being started."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_spare_coming)

    def close(self) -> None:
        """End all children that are idle, and the one that is being started."""
        with self._changed:
            self._is_closed = True
            processes, self._idle = self._idle, []
        for process in processes:
            process.close()

    def _take(self) -> AnyProcess:
        with self._changed:
            self._is_closed = False
            self._num_lent += 1
            self._wanted = self._size
            while True:
                kept = self._alive()
                if kept is not None:
                    break
                if not self._is_spare_coming:
                    break
                self._changed.wait()
        if kept is not None:
            self._start_spare()
            return kept
        try:
            process = self._start()
        except BaseException:
            with self._changed:
                self._num_lent -= 1
            raise
        self._start_spare()
        return process

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
            self._start_spare()

    def _start_spare(self) -> None:
        with self._changed:
            if self._is_spare_coming or not self._is_short():
                return
            self._is_spare_coming = True
        threading.Thread(target=self._add_spares, name="grammar-check-spare", daemon=True).start()

    def _is_short(self) -> bool:
        return not self._is_closed and len(self._idle) + self._num_lent < self._wanted

    def _add_spares(self) -> None:
        is_short = True
        while is_short:
            try:
                process = self._start()
            except Exception:  # noqa: BLE001  whoever needs one next tries again, and is told
                process = None
            with self._changed:
                is_kept = process is not None and not self._is_closed
                if process is not None and is_kept:
                    self._idle.append(process)
                is_short = is_kept and self._is_short()
                self._is_spare_coming = is_short
                self._changed.notify_all()
            if process is not None and not is_kept:
                process.close()
