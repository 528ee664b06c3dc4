"""What is remembered of each HTTP request: a line in the log, a figure, a span."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from attrs import define

if TYPE_CHECKING:
    from quire.server.errors import ApiError
    from quire.server.generation import Generation
    from quire.server.pooling_job import PoolingJob
    from quire.server.service import Service

log = logging.getLogger("quire.server.requests")

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]
MAX_LISTED = 128  # ends of sequences; of more each kind once
CLIENT_LEFT = 499  # as nginx counts them; never sent
SWITCHING_PROTOCOLS = 101


@define(kw_only=True)
class Record:
    """One request from its first byte to the end of its answer. Times are monotonic.

    A WebSocket has one of its own, and each question on it another.
    """

    route: str
    arrival_s: float
    status: int = 0
    model: str = ""
    generation: Generation | PoolingJob | None = None
    error: ApiError | None = None
    client_left: bool = False
    finished_s: float = 0.0

    @property
    def outcome(self) -> str:
        """How it ended: ok, error, or cancelled by its client."""
        if self.client_left:
            return "cancelled"
        return "error" if self.error is not None or self.status >= 400 else "ok"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompts."""
        return 0 if self.generation is None else self.generation.usage.prompt_tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens that were generated for it."""
        return 0 if self.generation is None else self.generation.usage.completion_tokens

    @property
    def scheduled_s(self) -> float | None:
        """When it left the queue."""
        return None if self.generation is None else self.generation.scheduled_s()

    @property
    def first_token_s(self) -> float | None:
        """When its first token came."""
        return None if self.generation is None else self.generation.first_token_s()

    @property
    def seconds_per_token(self) -> float | None:
        """The time from token to token, after the first one."""
        return None if self.generation is None else self.generation.seconds_per_token()

    @property
    def finish_reasons(self) -> list[str]:
        """Why its sequences ended."""
        return [] if self.generation is None else self.generation.finish_reasons

    def to_fields(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the log says of it; texts are not among it."""
        key = state.get("quire_key")
        fields: dict[str, Any] = {
            "request_id": state.get("request_id"),
            "key": None if key is None else key.key_id,
            "total_ms": round(1e3 * (self.finished_s - self.arrival_s), 1),
            "error": None if self.error is None else self.error.code or self.error.message,
        }
        if self.generation is not None:
            fields["prompt_tokens"] = self.prompt_tokens
            fields["generated_tokens"] = self.generated_tokens
            reasons = self.finish_reasons
            if len(reasons) > MAX_LISTED:
                reasons = sorted(set(reasons))
            fields["finish"] = ",".join(reasons)
            if self.first_token_s is not None:
                fields["first_token_ms"] = round(1e3 * (self.first_token_s - self.arrival_s), 1)
        return {name: value for name, value in fields.items() if value is not None}


def record_of(scope: Scope) -> Record:
    """Return the record of the request that is being served."""
    record: Record = scope["state"]["quire_record"]
    return record


class RecordMiddleware:
    """Keeps a record of every request and hands it on when the answer has ended."""

    def __init__(self, app: App, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        record = Record(route=scope["path"], arrival_s=time.monotonic())
        state = scope.setdefault("state", {})
        state["quire_record"] = record
        self._service.num_active += 1

        async def note_status(message: MutableMapping[str, Any]) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                record.status = message["status"]
            elif message["type"] == "websocket.accept":
                record.status = SWITCHING_PROTOCOLS
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            self._service.num_active -= 1
            finish_record(record, scope, self._service)


def finish_record(record: Record, scope: Scope, service: Service) -> None:
    """Count a request whose answer has ended, and log it."""
    record.finished_s = time.monotonic()
    record.error = record.error or scope["state"].get("quire_error")
    record.route = getattr(scope.get("route"), "path", "unknown")
    record.status = record.status or CLIENT_LEFT
    service.metrics.request_finished(record)
    if service.tracing is not None:
        service.tracing.request_finished(record, scope)
    if record.error is not None:
        service.metrics.error(record.error.code or record.error.type)
    extra = {"fields": record.to_fields(scope["state"])}
    log.info("%s %s %d", scope.get("method", "WS"), scope["path"], record.status, extra=extra)
