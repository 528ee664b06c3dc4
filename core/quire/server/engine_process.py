"""The engine's own process: `python -m quire.server.engine_process`, started by the server.

Its configuration comes as one line on standard input, which then stays open: when it ends, the
server is gone and so is this process. Requests and tokens travel over a local socket.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

import msgspec
import zmq

from quire.config import EngineConfig
from quire.errors import QuireError
from quire.phases import Phases
from quire.server.engine_loop import EngineLoop, Served
from quire.server.messages import Failed, Launch, encode

LINGER_MS = 2000  # how long the last words may take to reach the server


Build = Callable[[Launch], tuple[Served, dict[str, float]]]


def main(build: Build | None = None) -> None:
    """Run until told to stop, or until the server is gone.

    `build` makes the engine and says how long each phase took; a test double has its own.
    """
    # Ctrl-C reaches the whole group of the terminal; only the server decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.linger = LINGER_MS
    socket.connect(launch.address)
    code = _run(launch, socket, build or _load)
    socket.close()
    context.term()
    _leave(code)


def _run(launch: Launch, socket: zmq.Socket[bytes], build: Build) -> int:
    """Load and serve; what goes wrong is told to the server, which reports it."""
    try:
        engine, phases = build(launch)
        # What exists now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        EngineLoop(engine, socket).run(phases)
    except Exception as error:  # noqa: BLE001  the server reports it, with this traceback
        code = error.exit_code if isinstance(error, QuireError) else 1
        socket.send(encode(Failed(_summary(error), traceback.format_exc(), code)))
        return code
    return 0


def _load(launch: Launch) -> tuple[Served, dict[str, float]]:
    """Load the model that the server was asked for."""
    phases = Phases()
    with phases.timed("imports"):
        from quire.engine import Engine
        from quire.preparation import prepare
        from quire.server.served_engine import ServedEngine

    engine = ServedEngine(Engine(prepare(EngineConfig.from_options(launch.options), phases)))
    return engine, phases.seconds


def _summary(error: Exception) -> str:
    return str(error) if isinstance(error, QuireError) else f"{type(error).__name__}: {error}"


def _end_with_the_server() -> None:
    """Wait for the end of standard input: the server holds the other end and never writes."""
    while sys.stdin.buffer.read(4096):
        pass
    _leave(1)


def _leave(code: int) -> NoReturn:
    """End at once: neither threads of kernels nor a full disk may keep the process."""
    os._exit(code)


if __name__ == "__main__":
    main()
