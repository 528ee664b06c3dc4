"""A real server's spans, taken in by a small collector."""

from __future__ import annotations

import gzip
import http.server
import socket
import threading
import time
from typing import Any

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from serving import serving

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


class Collector(http.server.BaseHTTPRequestHandler):
    """Keeps the spans that are sent to it."""

    spans: list[Any]

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            data = gzip.decompress(data)
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_each_request_is_a_span_of_its_clients_trace() -> None:
    handler = type("Handler", (Collector,), {"spans": []})
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    with serving("--otel-endpoint", f"http://127.0.0.1:{collector.server_port}") as server:
        headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
        body = {"model": "demo", "prompt": "Hi", "max_tokens": 3, "ignore_eos": True}
        httpx.post(server.url + "/v1/completions", json=body, headers=headers)
        httpx.post(server.url + "/v1/completions", json={**body, "n": 0})
    collector.shutdown()

    good, bad = sorted(handler.spans, key=lambda span: span.start_time_unix_nano)  # type: ignore[attr-defined]
    values = {one.key: one.value for one in good.attributes}
    assert good.name == "POST /v1/completions"
    assert good.trace_id.hex() == TRACE_ID
    assert values["gen_ai.usage.output_tokens"].int_value == 3
    assert [event.name for event in good.events] == ["scheduled", "first token"]
    times = [event.time_unix_nano for event in good.events]
    assert good.start_time_unix_nano <= times[0] <= times[1] <= good.end_time_unix_nano
    assert bad.trace_id.hex() != TRACE_ID
    assert {one.key: one.value for one in bad.attributes}[
        "http.response.status_code"
    ].int_value == 400


def test_collector_that_does_not_answer_does_not_hold_the_end_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with serving("--otel-endpoint", endpoint, "--shutdown-timeout-s", "1") as server:
            body = {"model": "demo", "prompt": "Hi", "max_tokens": 1}
            httpx.post(server.url + "/v1/completions", json=body)
            begin_s = time.monotonic()

            assert server.stop() == 0
            assert time.monotonic() - begin_s < 4
