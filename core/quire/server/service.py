"""What the routes share: the engine, the keys, the figures, and whether requests may come."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from quire.errors import OverloadedError
from quire.frontend import Frontend
from quire.preparation import answer_parsers
from quire.server.access import Keys
from quire.server.admission import ServingLimits
from quire.server.async_engine import AsyncEngine
from quire.server.engine_client import ENGINE_MODULE
from quire.server.errors import model_not_found
from quire.server.event_stream import Patience
from quire.server.messages import Ready
from quire.server.metrics import ServerMetrics
from quire.server.options import ServerOptions
from quire.server.tracing import Tracing

log = logging.getLogger("quire.server")

WATCH_PERIOD_S = 0.5
MAX_LOGGED_REQUESTS = 50


class Service:
    """One server's state. Everything but the engine's process lives in one event loop."""

    def __init__(
        self,
        frontend: Frontend,
        options: ServerOptions,
        *,
        environment: Mapping[str, str],
        module: str = ENGINE_MODULE,
    ) -> None:
        """Check the keys. Raises: ConfigError."""
        self.options = options
        self.frontend = frontend
        self.keys = Keys.from_options(options, environment)
        self.tool_call_parser, self.reasoning_parser = answer_parsers(
            frontend.prepared.registry,
            tool_call=options.tool_call_parser,
            reasoning=options.reasoning_parser,
        )
        self.model_names = options.served_model_name or (frontend.config.model.model,)
        self.metrics = ServerMetrics(self.model_names[0])
        self.patience = Patience(
            keep_alive_s=options.keep_alive_s, reader_timeout_s=options.reader_timeout_s
        )
        limits = ServingLimits(
            tokenizer_pool_size=options.tokenizer_pool_size,
            max_queued_requests=options.max_queued_requests,
            max_queued_tokens=options.max_queued_tokens,
            max_engine_restarts=options.max_engine_restarts,
        )
        self.engine = AsyncEngine.from_frontend(frontend, limits, module=module)
        self.engine.on_stats = self.metrics.step
        self.engine.on_restart = self.metrics.engine_restarted
        endpoint = options.otel_endpoint
        self.tracing = None if endpoint is None else Tracing(endpoint, self.model_names[0])
        self.created = int(time.time())
        self.fingerprint = "fp_starting"
        self.max_step_tokens = 0
        self.is_draining = False
        self.is_stalled = False
        self.on_drain: set[Callable[[], None]] = set()  # what wakes connections that wait
        self.num_active = 0  # requests between their first byte and the end of their answer

    async def start(self) -> Ready:
        """Load the model. Raises: EngineStartError."""
        ready = await self.engine.start()
        self.fingerprint = _fingerprint(self.model_names[0], ready)
        self.max_step_tokens = ready.max_step_tokens
        return ready

    def why_not_ready(self) -> str | None:
        """Return why `/health` fails, None if it does not."""
        if self.is_draining:
            return "the server is shutting down"
        if self.is_stalled:
            return "the engine has work and makes no step"
        return None if self.engine.is_ready else "the engine is not ready"

    def drain(self) -> None:
        """Take on nothing more, and wake those who wait for more."""
        self.is_draining = True
        for wake in tuple(self.on_drain):
            wake()

    def check_open(self) -> None:
        """Refuse new work while the server ends. Raises: OverloadedError."""
        if self.is_draining:
            raise OverloadedError("the server is shutting down.", code="shutting_down")

    def check_model(self, name: str) -> None:
        """Refuse a model that is not served. Raises: ApiError."""
        if name not in self.model_names:
            raise model_not_found(name)

    async def watch(self) -> None:
        """Notice an engine that has work and makes no step, and say where the requests stand."""
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            is_stalled = self.engine.idle_s() > self.options.stall_timeout_s
            if is_stalled and not self.is_stalled:
                self._report_stall()
            elif self.is_stalled and not is_stalled:
                log.warning("the engine makes steps again")
            self.is_stalled = is_stalled

    def _report_stall(self) -> None:
        self.metrics.error("stall")
        streams = self.engine.streams
        log.error(
            "no step for %.0f s with %d requests in the engine",
            self.engine.idle_s(),
            len(streams),
        )
        for stream in streams[:MAX_LOGGED_REQUESTS]:
            log.error("%s", stream.standing())


_IS_DETERMINISTIC = "mode: deterministic"


def _fingerprint(model: str, ready: Ready) -> str:
    """Return a short name for what decides the numbers: model, plugins, versions and mode."""
    from quire import __version__

    lines = [f"quire: {__version__}", f"served as: {model}", *ready.identity]
    short = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    fingerprint = f"fp_{short}" + ("_deterministic" if _IS_DETERMINISTIC in lines else "")
    log.info("system_fingerprint %s stands for %s", fingerprint, "; ".join(lines))
    return fingerprint


def model_card(service: Service, name: str) -> dict[str, Any]:
    """Return the entry of one model in `/v1/models`."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "quire",
        "root": service.frontend.config.model.model,
        "max_model_len": service.frontend.max_model_len,
    }
