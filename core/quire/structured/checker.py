"""Compile a grammar in a process that can be killed, before a request that asks for it is taken."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from quire.constraints import GrammarSource, StructuredOutputsParams
from quire.errors import RequestError
from quire.structured.check_pool import CheckPool
from quire.structured.check_queue import CheckQueue
from quire.structured.compiler import GrammarSetup

CHECK_S = 0.8
START_S = 60.0
MEMORY_BYTES = 2**30
MOST_PROCESSES = 8
MAX_KEPT = 1024
MAX_KEPT_CHARS = 2**23
MAX_ANSWER_BYTES = 2**16
PASSED_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
TOO_LONG = f"compiling it takes more than {CHECK_S} s, or too much memory; simplify it"


def num_processes() -> int:
    """Return how many children are kept: two, or one for every other processor."""
    return min(max(2, len(os.sched_getaffinity(0)) // 2), MOST_PROCESSES)


OnHonoured = Callable[[GrammarSource], object]


class CheckStopped(Exception):
    """The child took too long or ended."""


class CheckProcess:
    """One child; it has loaded the engine once it is made. Raises: CheckStopped."""

    def __init__(
        self,
        setup: GrammarSetup,
        disabled: tuple[str, ...],
        on_begin: Callable[[CheckProcess], None] = lambda _: None,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "quire.structured.check_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
        )
        self._unread = b""  # of its answers
        self._in_use = threading.RLock()
        self._finalizer = weakref.finalize(self, _end, self._process, self._in_use)
        on_begin(self)  # it may be ended from now on, while it loads
        first = {
            "backend": setup.backend,
            "folder": str(setup.folder),
            "vocab_size": setup.vocab_size,
            "eos_token_ids": list(setup.eos_token_ids),
            "disabled": list(disabled),
            "memory_bytes": MEMORY_BYTES,
        }
        self.ask(first, START_S)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it may be asked."""
        return self._process.poll() is None

    def ask(self, message: object, seconds: float) -> str:
        """Return the answer to a message. Raises: CheckStopped; the child is gone then."""
        self.send(message)
        return self.receive(seconds)

    def send(self, *messages: object) -> None:
        """Send messages; short ones may be sent while one is answered. Raises: CheckStopped."""
        assert self._process.stdin is not None, "it was opened with a pipe"
        lines = "".join([json.dumps(message) + "\n" for message in messages])
        try:
            with self._in_use:
                self._process.stdin.write(lines.encode())
                self._process.stdin.flush()
        except (OSError, ValueError) as error:
            self.close()
            raise CheckStopped(str(error)) from error

    def receive(self, seconds: float) -> str:
        """Return the answer to the first message that has none. Raises: CheckStopped."""
        try:
            with self._in_use:
                answer: str = json.loads(self._line(seconds))
            return answer
        except (OSError, ValueError, TimeoutError) as error:
            self.close()
            raise CheckStopped(str(error)) from error

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None, "it was opened with a pipe"
        source = self._process.stdout.fileno()
        until = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([source], [], [], max(until - time.monotonic(), 0))
            part = os.read(source, MAX_ANSWER_BYTES) if ready else b""
            if not part:
                raise TimeoutError("no answer")
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def close(self) -> None:
        """End the child. Calling it again does nothing."""
        self._finalizer()


def _environment() -> dict[str, str]:
    """Return no secrets, and where this process finds its modules."""
    found = {name: os.environ[name] for name in PASSED_ENVIRONMENT if name in os.environ}
    return {**found, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def _end(process: subprocess.Popen[bytes], in_use: threading.RLock) -> None:
    process.kill()
    process.wait()
    # Whoever waits for it hears that it has ended. Had its pipes been closed before, that thread
    # would read from another child's, which was given the same number.
    assert process.stdin is not None, "it was opened with a pipe"
    assert process.stdout is not None, "it was opened with a pipe"
    with in_use:
        with contextlib.suppress(OSError):  # what was still to be written
            process.stdin.close()
        process.stdout.close()


def _message(source: GrammarSource) -> dict[str, str]:
    return {"kind": source.kind, "text": source.text}


class GrammarChecker:
    """Answer whether a grammar can be honoured, each content once; safe for threads.

    `num_processes()` children are kept, from when the first is needed or `prepare` is called.
    """

    def __init__(self, setup: GrammarSetup, disabled: tuple[str, ...] = ()) -> None:
        self._children: weakref.WeakSet[CheckProcess] = weakref.WeakSet()
        self._pool = CheckPool(self._start_with(setup, disabled), num_processes())
        self._lock = threading.Lock()
        self._answers: OrderedDict[GrammarSource, str] = OrderedDict()
        self._chars = 0

    def _start_with(
        self, setup: GrammarSetup, disabled: tuple[str, ...]
    ) -> Callable[[], CheckProcess]:
        return lambda: CheckProcess(setup, disabled, self._children.add)

    @property
    def pids(self) -> list[int]:
        """The process ids of children that wait for work, once those that start have started."""
        self._pool.wait()
        return self._pool.pids

    def prepare(self) -> None:
        """Begin to start children, in a thread."""
        self._pool.prepare()

    def knows(self, params: StructuredOutputsParams) -> bool:
        """Whether the answer to a grammar is there already."""
        with self._lock:
            return params.source in self._answers

    def check_all(
        self,
        asked: Sequence[StructuredOutputsParams],
        on_honoured: OnHonoured = lambda _: None,
    ) -> None:
        """Check grammars side by side, so that `check` has their answers; says nothing itself.

        `on_honoured` is called for each that can be honoured, in threads, while others are checked.
        """
        new = dict.fromkeys(one.source for one in asked if not self.knows(one))
        if len(new) < 2:
            return
        count = min(num_processes(), len(new))
        queue = CheckQueue(list(new)[:MAX_KEPT], count)
        with ThreadPoolExecutor(count, "quire-forms") as threads:
            parts = [threads.submit(self._check_some, queue, on_honoured) for _ in range(count)]
        for part in parts:
            part.result()

    def _check_some(self, queue: CheckQueue, on_honoured: OnHonoured) -> None:
        """Check grammars until none is left, with another child where one was killed."""
        with contextlib.suppress(CheckStopped):  # none starts, which `check` says
            while queue:
                with self._pool.lend_while(lambda: bool(queue)) as process:
                    self._check_with(process, queue, on_honoured)

    def _check_with(
        self, process: CheckProcess | None, queue: CheckQueue, on_honoured: OnHonoured
    ) -> None:
        """Check until none is left or the child is gone, sending some while one is checked.

        What takes too long is left without an answer: `check` tries again, alone.
        """
        sent: deque[GrammarSource] = deque()
        while process is not None and ((taken := queue.take(sent)) or sent):
            sent += taken
            try:
                process.send(*map(_message, taken))
                answer = process.receive(CHECK_S)
            except CheckStopped:
                queue.give_back(list(sent)[1:])  # the first was begun
                return
            source = sent.popleft()
            self._keep(source, answer)
            if not answer:
                on_honoured(source)

    def check(self, params: StructuredOutputsParams) -> None:
        """Raise RequestError where the grammar cannot be honoured, or takes too long to compile."""
        source = params.source
        with self._lock:
            answer = self._answers.get(source)
        if answer is None:
            answer = self._ask(source)
            if answer != TOO_LONG:  # which a busy machine may be to blame for
                self._keep(source, answer)
        if answer:
            raise params.error(f"cannot be honoured: {answer.rstrip('.')}")

    def close(self) -> None:
        """End all children, those that load or work too."""
        self._pool.close()
        for child in list(self._children):
            child.close()

    def _ask(self, source: GrammarSource) -> str:
        try:
            with self._pool.lend() as process:
                return self._answer(process, source)
        except CheckStopped as error:
            raise RequestError(
                "structured_outputs cannot be checked: the process that compiles grammars "
                "does not start; look at the grammar engine's installation.",
                parameter="structured_outputs",
            ) from error

    def _answer(self, process: CheckProcess, source: GrammarSource) -> str:
        try:
            return process.ask(_message(source), CHECK_S)
        except CheckStopped:
            return TOO_LONG

    def _keep(self, source: GrammarSource, answer: str) -> None:
        with self._lock:
            if source in self._answers:
                return
            self._answers[source] = answer
            self._chars += len(source.text)
            while len(self._answers) > MAX_KEPT or self._chars > MAX_KEPT_CHARS:
                oldest, _ = self._answers.popitem(last=False)
                self._chars -= len(oldest.text)
