"""The parent's side of the processes that render chat templates: start, ask, kill, start again."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from attrs import frozen

WORKER_FILE = Path(__file__).with_name("template_worker.py")
# What the child may see of the environment: no secrets, but the time zone for strftime_now.
PASSED_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")
START_GRACE_S = 10.0
# Isolated, so without PYTHONPATH; Jinja2 comes from where this process would take it from.
START_WORKER = (
    "import runpy, sys; sys.path.append(sys.argv[1]); "
    "runpy.run_path(sys.argv[2], run_name='__main__')"
)
RECEIVE_BYTES = 65536


@frozen(kw_only=True)
class TemplateLimits:
    """What one rendering may take.

    `time_s` is wall-clock time, `memory_bytes` what the child may take above its start,
    `num_processes` how many renderings run at once.
    """

    time_s: float = 2.0
    output_chars: int = 4_000_000
    memory_bytes: int = 384 * 2**20
    num_processes: int = 2


class TemplateStopped(Exception):
    """The child did not answer. `reason` is `time` or `crash`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _worker_command() -> list[str]:
    spec = importlib.util.find_spec("jinja2")
    origin = spec.origin if spec is not None else None
    assert origin is not None, "jinja2 is a dependency of Quire"
    packages = str(Path(origin).parents[1])
    return [sys.executable, "-I", "-c", START_WORKER, packages, str(WORKER_FILE)]


def _to_json(value: Mapping[str, Any]) -> bytes:
    """Return JSON; ten times as fast as `json`, while which no other thread would run."""
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError):  # such as a number above 64 bits
        return json.dumps(value).encode()


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    process.kill()
    # Killed, so it ends at once; without the wait it would stay a zombie.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)


class TemplateProcess:
    """One child. It ends when this object goes, when its parent dies, or when it is killed."""

    def __init__(self, templates: Mapping[str, str], limits: TemplateLimits) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                _worker_command(),
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={k: os.environ[k] for k in PASSED_ENVIRONMENT if k in os.environ},
                start_new_session=True,
            )
        self._channel = ours
        self._channel.settimeout(limits.time_s + START_GRACE_S)
        # JSON writes a character in at most twelve bytes.
        self._max_bytes = 12 * limits.output_chars + RECEIVE_BYTES
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self._process, self._channel)
        self._send(
            {
                "templates": dict(templates),
                "memory_bytes": limits.memory_bytes,
                "time_s": limits.time_s,
            }
        )

    @property
    def is_usable(self) -> bool:
        """Whether it runs and belongs to this process, not to one this was forked from."""
        return self._owner == os.getpid() and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and return the answer.

        Raises: TemplateStopped when the child was killed or does not answer; it is gone then.
        """
        try:
            self._send(request)
            line = self._receive_line()
        except TimeoutError as error:
            self.close()
            raise TemplateStopped("time") from error
        except OSError as error:
            raise self._stopped() from error
        if not line.endswith(b"\n"):
            raise self._stopped()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the child. Calling it again does nothing."""
        if self._owner == os.getpid():
            self._finalizer()

    def _send(self, value: Mapping[str, Any]) -> None:
        # A child that is gone already is noticed by `ask`, which finds no answer.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.sendall(_to_json(value) + b"\n")

    def _receive_line(self) -> bytes:
        """Return a line, or what came of one that has no end or is longer than an answer is."""
        parts: list[bytes] = []
        size = 0
        while size <= self._max_bytes and (part := self._channel.recv(RECEIVE_BYTES)):
            parts.append(part)
            size += len(part)
            if part.endswith(b"\n"):
                break
        return b"".join(parts)

    def _stopped(self) -> TemplateStopped:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        is_late = self._process.returncode == -signal.SIGALRM
        self.close()
        return TemplateStopped("time" if is_late else "crash")


class TemplatePool:
    """Up to `num_processes` children, started when first needed; safe for threads."""

    def __init__(self, templates: Mapping[str, str], limits: TemplateLimits) -> None:
        self._templates = dict(templates)
        self._limits = limits
        self._idle: list[TemplateProcess] = []
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(limits.num_processes)

    @property
    def num_idle(self) -> int:
        """How many children wait for work."""
        return len(self._idle)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request to a child that is free. Raises: TemplateStopped."""
        with self._slots:
            process = self._take()
            try:
                answer = process.ask(request)
            except BaseException:
                process.close()
                raise
            if answer["kind"] == "memory":
                process.close()
            else:
                self._give_back(process)
            return answer

    def close(self) -> None:
        """End all idle children; a later request starts a new one."""
        with self._lock:
            processes, self._idle = self._idle, []
        for process in processes:
            process.close()

    def _take(self) -> TemplateProcess:
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.is_usable:
                    return process
                process.close()
        return TemplateProcess(self._templates, self._limits)

    def _give_back(self, process: TemplateProcess) -> None:
        with self._lock:
            self._idle.append(process)
