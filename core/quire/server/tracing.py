"""Spans of requests for OpenTelemetry: `--otel-endpoint`, with `pip install 'quire[otel]'`."""

from __future__ import annotations

import time
import urllib.parse
from typing import Any

from quire.errors import ConfigError
from quire.server.records import Record, Scope

TRACES_PATH = "/v1/traces"
FLUSH_MS = 2000


class Tracing:
    """Sends one span a request, as OTLP over HTTP, from a thread of its own.

    Names of attributes are those of OpenTelemetry's conventions for HTTP and generative models.
    """

    def __init__(self, endpoint: str, model_name: str) -> None:
        """Connect to nothing yet. Raises: ConfigError without the packages, or for a bad URL."""
        url = _url_of(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                "--otel-endpoint needs OpenTelemetry; install it with `pip install 'quire[otel]'`."
            ) from error
        resource = Resource.create({"service.name": "quire"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("quire.server")
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    def request_finished(self, record: Record, scope: Scope) -> None:
        """Make the span of a request; a `traceparent` header says whose part it is."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        method = scope.get("method", "WS")
        span = self._tracer.start_span(
            f"{method} {record.route}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "http.route": record.route,
                "http.response.status_code": record.status,
                "quire.request_id": scope["state"]["request_id"],
                "quire.outcome": record.outcome,
                **self._generated(record),
            },
            start_time=_wall_ns(record.arrival_s),
        )
        for name, at_s in (
            ("scheduled", record.scheduled_s),
            ("first token", record.first_token_s),
        ):
            if at_s is not None:
                span.add_event(name, timestamp=_wall_ns(at_s))
        if record.error is not None:
            span.set_attribute("error.type", record.error.code or record.error.type)
            span.set_status(Status(StatusCode.ERROR, record.error.message))
        span.end(_wall_ns(record.finished_s))

    def flush(self) -> None:
        """Send what waits, for at most two seconds."""
        self._provider.force_flush(FLUSH_MS)

    def _generated(self, record: Record) -> dict[str, Any]:
        if record.generation is None:
            return {}
        found: dict[str, Any] = {
            "gen_ai.request.model": self._model_name,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.generated_tokens,
            "gen_ai.response.finish_reasons": record.finish_reasons,
        }
        if record.first_token_s is not None:
            waited_s = record.first_token_s - record.arrival_s
            found["gen_ai.response.time_to_first_chunk"] = waited_s
        return found


def _url_of(endpoint: str) -> str:
    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"--otel-endpoint is {endpoint!r}; allowed: a URL such as http://127.0.0.1:4318."
        )
    return endpoint if parts.path not in ("", "/") else endpoint.rstrip("/") + TRACES_PATH


def _wall_ns(at_s: float) -> int:
    """Return a monotonic time as nanoseconds since 1970."""
    return time.time_ns() - round(1e9 * (time.monotonic() - at_s))
