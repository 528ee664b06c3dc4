"""A real `quire serve` in a process of its own, and what its figures say."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

QUIRE = Path(sys.executable).with_name("quire")
START_S = 90.0


class Server:
    """A running server; `lines` are what it logged so far."""

    def __init__(
        self,
        *options: str,
        model: str = "demo",
        command: tuple[str, ...] = (),
        log_to: int | None = None,
    ) -> None:
        begin = command or (str(QUIRE), "serve", model, "--port", "0")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*begin, *options],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._log if log_to is None else log_to,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        self.log = ""
        self.port = 0

    def read_log(self) -> str:
        """Return everything that was logged so far."""
        self.log = _whole(self._log)
        return self.log

    def read_output(self) -> str:
        """Return everything that was written to standard output."""
        return _whole(self._output)

    def wait_for_log(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """Wait until a logged line matches."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            ended = self.process.poll() is not None
            if found := re.search(pattern, self.read_log()):
                return found
            assert not ended, f"the server ended: {self.log}"
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {self.log}")

    def wait_until_ready(self) -> None:
        """Wait for the line that says where it listens."""
        self.port = int(self.wait_for_log(r"ready: \w+://[^ ]+:(\d+) ")[1])

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        """Return the body of a path."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return str(answer.read().decode())

    def figure(self, name: str) -> float:
        """Return a figure of /metrics, all labels together."""
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics"), re.M)
        return sum(map(float, found))

    def wait_until_idle(self, timeout_s: float = 10.0) -> None:
        """Wait until nothing runs or waits and all blocks are free."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "quire:kv_blocks_used")
        end_s = time.monotonic() + timeout_s
        while any(self.figure(name) for name in names):
            assert time.monotonic() < end_s, {name: self.figure(name) for name in names}
            time.sleep(0.02)

    def engine_pid(self) -> int:
        """Return the engine's process id."""
        return next(
            pid for pid, line in children(self.process.pid) if re.search(r"-m \S*engine", line)
        )

    def stop(self) -> int:
        """End the server and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.read_log()
        return code


def children(pid: int) -> list[tuple[int, str]]:
    """Return the processes below one: their ids and command lines."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append((child, line))
                found += children(child)
    return found


def _whole(file: IO[bytes]) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has waited for yet has."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@contextlib.contextmanager
def serving(*options: str, **other: object) -> Iterator[Server]:
    """Run a server that is ready, and end it."""
    server = Server(*options, **other)  # type: ignore[arg-type]
    try:
        server.wait_until_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def events_of(body: str) -> list[object]:
    """Return the events of a stream; `[DONE]` stays a text."""
    data = [line[6:] for line in body.split("\n\n") if line.startswith("data: ")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]
