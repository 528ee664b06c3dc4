"""The server's end of an engine process: start it, talk with it, notice that it died, end it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import zmq
from attrs import frozen

from quire.server.messages import (
    Failed,
    FromEngine,
    Launch,
    Ready,
    Stop,
    ToEngine,
    decode_from_engine,
    encode,
)

ENGINE_MODULE = "quire.server.engine_process"
MAX_SOCKET_PATH_CHARS = 100  # the system allows 107
MESSAGES_A_TURN = 8
TURN_S = 0.01
LAST_WORDS_TURNS = 20


@frozen(kw_only=True)
class Death:
    """Why an engine process ended. With `exit_code` 2 starting it again is vain."""

    message: str
    traceback: str = ""
    exit_code: int = 1


class EngineClient:
    """One engine process, from its start to its end.

    `on_message` gets what the engine says after `Ready`; `on_death` is called once, when the
    process has ended without being asked to.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        on_message: Callable[[FromEngine], None],
        on_death: Callable[[Death], None],
        module: str = ENGINE_MODULE,
    ) -> None:
        self._options = dict(options)
        self._on_message = on_message
        self._on_death = on_death
        self._module = module
        self._folder: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._loop = asyncio.get_running_loop()
        self._watcher: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._failed: Failed | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The engine's process id, None before the start."""
        return None if self._process is None else self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs and was not told to stop."""
        running = self._process is not None and self._process.returncode is None
        return running and not self._stopping

    async def start(self) -> Ready:
        """Start the process and wait until the model is loaded.

        Raises: EngineStartError. Whatever is raised, nothing is left of the start.
        """
        try:
            await self._launch()
            ready = await self._ready
            self._remove_folder()  # both ends are connected
            return ready
        except BaseException as error:
            self.kill()
            self.close()
            if not isinstance(error, (OSError, zmq.ZMQError)):
                raise
            death = Death(message=f"the engine process cannot be started: {error}")
            raise EngineStartError(death) from error

    async def _launch(self) -> None:
        """Open a socket, and start a process that connects to it."""
        self._folder = _private_folder()
        address = f"ipc://{self._folder}/engine"
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.linger = 0
        # Admission bounds what waits here while the engine is in a long step.
        self._socket.sndhwm = 0
        self._socket.bind(address)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            # Output on standard output belongs to whoever called the server.
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        launch = Launch(options=self._options, address=address)
        with contextlib.suppress(ConnectionError):  # it died at once: `_watch` says why
            self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
            await self._process.stdin.drain()
        self._loop.add_reader(int(self._socket.FD), self._read)
        self._watcher = asyncio.create_task(self._watch())

    def send(self, message: ToEngine) -> None:
        """Queue a message; one to an engine that is gone is dropped."""
        self.send_encoded(encode(message))

    def send_encoded(self, data: bytes) -> None:
        """Queue a message that was encoded before."""
        if self._socket is None or not self.is_alive:
            return
        with contextlib.suppress(zmq.Again):  # it died, and `_watch` is about to say so
            self._socket.send(data, zmq.NOBLOCK)
        # Its descriptor signals once for many changes, and sending may have taken the signal.
        if cast(int, self._socket.events) & zmq.POLLIN:
            self._loop.call_soon(self._read)

    async def stop(self, grace_s: float) -> None:
        """Ask the process to end, and end it after `grace_s`. May be called again."""
        process = self._process
        if process is not None and process.returncode is None:
            self.send(Stop())
            self._stopping = True
            try:
                await asyncio.wait_for(process.wait(), grace_s)
            except TimeoutError:
                self.kill()
                await process.wait()
        self.close()

    def kill(self) -> None:
        """End the process now."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def close(self) -> None:
        """Let go of the socket and its folder."""
        if self._watcher is not None and self._watcher is not asyncio.current_task():
            self._watcher.cancel()
        if not self._ready.done():
            death = Death(message="the engine was stopped before it was ready")
            self._ready.set_exception(EngineStartError(death))
            self._ready.exception()  # perhaps nobody waits for it
        if self._socket is not None and not self._socket.closed:
            self._loop.remove_reader(int(self._socket.FD))
            self._socket.close()
        self._context.term()
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _read(self) -> None:
        """Take what is there, but let others have a turn after a few messages, or a large one."""
        end_s = time.perf_counter() + TURN_S
        for _ in range(MESSAGES_A_TURN):
            if time.perf_counter() > end_s:
                break
            if self._socket is None or self._socket.closed:
                return
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(decode_from_engine(data))
        self._loop.call_soon(self._read)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Ready):
            if not self._ready.done():  # `start` may have been cancelled
                self._ready.set_result(message)
        elif isinstance(message, Failed):
            self._failed = message
        else:
            self._on_message(message)

    async def _watch(self) -> None:
        """Wait for the process to end, and say why it did."""
        assert self._process is not None
        code = await self._process.wait()
        if self._stopping:
            return
        await self._hear_last_words()
        death = self._death(code)
        self._stopping = True
        if not self._ready.done():
            self._ready.set_exception(EngineStartError(death))
        else:
            self._on_death(death)

    async def _hear_last_words(self) -> None:
        """Take in what the process sent before it ended, its failure last."""
        for _ in range(LAST_WORDS_TURNS):
            self._read()
            if self._failed is not None:
                return
            await asyncio.sleep(0.01)

    def _death(self, code: int) -> Death:
        if self._failed is not None:
            failed = self._failed
            return Death(
                message=failed.message, traceback=failed.traceback, exit_code=failed.exit_code
            )
        if code < 0:
            return Death(message=f"the engine process was ended by {_signal_name(-code)}")
        return Death(message=f"the engine process ended with exit code {code}")


class EngineStartError(Exception):
    """Report an engine process that ended before the model was loaded."""

    def __init__(self, death: Death) -> None:
        super().__init__(death.message)
        self.death = death


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _private_folder() -> Path:
    """Make a folder that only this user can open, with a path short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="quire-"))
    if len(str(folder)) <= MAX_SOCKET_PATH_CHARS - len("/engine"):
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="quire-", dir="/tmp"))
