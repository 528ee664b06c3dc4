"""Log lines on standard error, plain or as JSON.

A thread writes them: neither a full disk nor a reader that stops holds a request up. What cannot
be written is lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import queue
import secrets
import sys
import time
from typing import Any

from quire.errors import RequestError
from quire.server.access import header
from quire.server.options import ServerOptions
from quire.text.json_files import shorten

MAX_ID_CHARS = 128
MAX_WAITING_LINES = 16384
DRAIN_S = 1.0
REQUEST_ID_HEADER = b"x-request-id"


class LineHandler(logging.Handler):
    """Writes one line a record, if it can."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def createLock(self) -> None:  # noqa: N802  logging's name
        """Have no lock: one thread writes, and if it is stuck the end must not wait for it."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; one that cannot be written is lost."""
        try:
            line = _json_line(record) if self._as_json else _plain_line(record)
            _write(sys.stderr.fileno(), (line + "\n").encode("utf-8", "backslashreplace"))
        except (OSError, ValueError, AttributeError):  # a full disk, a closed or absent stream
            pass


class WaitingLines(logging.handlers.QueueHandler):
    """Hands records to the thread that writes; at `MAX_WAITING_LINES`, new ones are lost."""

    queue: queue.Queue[Any]

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Return the record as it is: it stays within this process."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a record without waiting."""
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)

    def drain(self, timeout_s: float = DRAIN_S) -> None:
        """Wait until all is written, or until `timeout_s` is over."""
        end_s = time.monotonic() + timeout_s
        while self.queue.unfinished_tasks and time.monotonic() < end_s:
            time.sleep(0.001)


def _write(descriptor: int, data: bytes) -> None:
    """Write without the stream's lock, on which the end of the process would wait."""
    while data:
        data = data[os.write(descriptor, data) :]


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return dict(getattr(record, "fields", None) or {})


def _json_line(record: logging.LogRecord) -> str:
    line = {"ts": round(record.created, 3), "level": record.levelname.lower()}
    line |= {"logger": record.name, "message": record.getMessage(), **_fields(record)}
    if record.exc_info:
        line["traceback"] = logging.Formatter().formatException(record.exc_info)
    return json.dumps(line, default=str)


def _plain_line(record: logging.LogRecord) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(record.created))
    fields = _fields(record)
    trace = fields.pop("traceback", "")
    if record.exc_info:
        trace = logging.Formatter().formatException(record.exc_info)
    words = [when, record.levelname, _visible(record.getMessage())]
    words += [f"{name}={_visible(str(value))}" for name, value in fields.items()]
    # A traceback is ours, so that it may have lines.
    return " ".join(words) + (f"\n{trace.rstrip()}" if trace else "")


def _visible(text: str) -> str:
    """Escape what could forge a line or steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def configure_logs(options: ServerOptions) -> WaitingLines:
    """Send every logger's lines through one thread."""
    handler = WaitingLines(queue.Queue(MAX_WAITING_LINES))
    writer = LineHandler(as_json=options.log_json)
    logging.handlers.QueueListener(handler.queue, writer).start()
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("quire").setLevel(options.log_level.upper())
    return handler


def request_id_of(headers: Any) -> str:
    """Return the client's request id, or a new one. Raises: RequestError."""
    given = header(headers, REQUEST_ID_HEADER)
    if given is None:
        return secrets.token_hex(16)
    text = given.decode("latin-1")
    if not (0 < len(text) <= MAX_ID_CHARS and text.isascii() and text.isprintable()):
        raise RequestError(
            f"X-Request-Id is {shorten(text)}; allowed: 1 to {MAX_ID_CHARS} printable ASCII "
            "characters.",
            parameter="X-Request-Id",
        )
    return text


class RequestIdMiddleware:
    """Gives every request an id, and every answer the same."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        try:
            request_id = request_id_of(scope["headers"])
        except RequestError as error:
            state["quire_refused"] = error  # answered further in, where errors are
            request_id = secrets.token_hex(16)
        state["request_id"] = request_id
        pair = (REQUEST_ID_HEADER, request_id.encode())

        async def send_with_id(message: Any) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                message["headers"] = [*message.get("headers", ()), pair]
            await send(message)

        await self._app(scope, receive, send_with_id)
