"""Run the server: listen, load, serve, and end in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from quire.errors import ConfigError
from quire.frontend import Frontend
from quire.server.access import tls_settings
from quire.server.app import build_app
from quire.server.engine_client import ENGINE_MODULE, Death, EngineStartError
from quire.server.http_protocol import limited_protocol
from quire.server.logs import WaitingLines, configure_logs
from quire.server.messages import Ready
from quire.server.options import ServerOptions
from quire.server.service import Service

log = logging.getLogger("quire.server")

BACKLOG = 4096
HARD_EXIT_S = 5.0  # after the time to finish is over
FLUSH_S = 2.0
# The event loop is busy most of the time; a thread that tokenizes need not wait 5 ms for a turn.
SWITCH_INTERVAL_S = 0.001
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(frontend: Frontend, options: ServerOptions, *, module: str = ENGINE_MODULE) -> int:
    """Serve until a signal comes or the engine is given up; return the exit code.

    Raises: ConfigError before anything is started.
    """
    begin_s = time.monotonic()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    lines = configure_logs(options)
    tls = tls_settings(options)
    service = Service(frontend, options, environment=os.environ, module=module)
    with _listen(options.host, options.port) as listener:
        run = Run(service, listener, tls, begin_s, lines)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            code = runner.run(run.main())
    lines.drain()
    return code


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Open the listening socket at once, so that a port in use is known before a model loads."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"cannot listen on {host}:{port}: {reason}. --port 0 takes a free port, "
                "--host another address."
            ) from error
        yield listener


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Run:
    """One run of the server, from listening to its exit code."""

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        tls: dict[str, Any],
        begin_s: float,
        lines: WaitingLines,
    ) -> None:
        self.service = service
        self._lines = lines
        self._listener = listener
        self._begin_s = begin_s
        self._exit_code: int | None = None
        self._end = asyncio.Event()
        options = service.options
        config = uvicorn.Config(
            build_app(service),
            http=limited_protocol(options),
            ws="websockets-sansio",
            ws_max_size=options.max_body_bytes,
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=max(1, round(options.idle_timeout_s)),
            timeout_graceful_shutdown=round(FLUSH_S),
            **tls,
        )
        self._scheme = "https" if config.is_ssl else "http"
        self._server = _Server(config)

    async def main(self) -> int:
        """Serve until the end and return the exit code."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        self.service.engine.on_given_up = self._on_given_up
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        others = [
            asyncio.create_task(self.service.watch()),
            asyncio.create_task(self.service.patience.run()),
            asyncio.create_task(self._load()),
        ]
        await self._end.wait()
        self._arm_hard_exit()
        await self._finish_requests()
        self._server.should_exit = True
        await serving
        for task in others:
            task.cancel()
        await self.service.engine.stop(FLUSH_S)
        if self.service.tracing is not None:
            await asyncio.to_thread(self.service.tracing.flush)
        log.info("ended")
        return self._exit_code or 0

    async def _load(self) -> None:
        try:
            ready = await self.service.start()
        except EngineStartError as error:
            log.error("%s", error.death.message, extra={"fields": _traceback(error.death)})
            self._stop(error.death.exit_code)
            return
        # What exists now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        self._say_ready(ready)

    def _say_ready(self, ready: Ready) -> None:
        host, port = self._listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        phases = {**ready.phases_s, "all": time.monotonic() - self._begin_s}
        took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
        log.info(
            "ready: %s://%s:%d serves %s, context %d (%s)",
            self._scheme,
            host,
            port,
            self.service.model_names[0],
            ready.max_model_len,
            took,
        )

    def _on_signal(self) -> None:
        if self._end.is_set():
            log.warning("a second signal: ending at once")
            self._end_now(1)
        log.info("shutting down: %d requests to finish", self.service.num_active)
        self._stop(0)

    def _on_given_up(self, death: Death) -> None:
        log.error("the engine is given up: %s", death.message)
        self._stop(death.exit_code or 1)

    def _stop(self, code: int) -> None:
        if self._exit_code is None:
            self._exit_code = code
        self.service.drain()
        self._end.set()

    async def _finish_requests(self) -> None:
        """Take no more connections, and let requests end by themselves for a while."""
        for server in self._server.servers:
            server.close()
        end_s = time.monotonic() + self.service.options.shutdown_timeout_s
        while self.service.num_active and time.monotonic() < end_s and not self._exit_code:
            await asyncio.sleep(0.02)
        if self.service.num_active:
            log.warning("%d requests are ended with an error", self.service.num_active)
            self.service.engine.fail_all("the server is shutting down.")
            end_s = time.monotonic() + FLUSH_S
            while self.service.num_active and time.monotonic() < end_s:
                await asyncio.sleep(0.02)

    def _arm_hard_exit(self) -> None:
        """End even if something hangs: no client and no kernel may keep the process."""
        limit_s = self.service.options.shutdown_timeout_s + HARD_EXIT_S
        timer = threading.Timer(limit_s, self._end_now, [1])
        timer.daemon = True
        timer.start()

    def _end_now(self, code: int) -> None:
        self.service.engine.kill()
        self._lines.drain(0.2)
        os._exit(code)


def _traceback(death: Death) -> dict[str, str]:
    return {"traceback": death.traceback} if death.traceback else {}
