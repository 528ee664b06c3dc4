"""HTTP/1.1 with bounds: headers in bytes, number and time, and our own words for bad bytes."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quire.server.errors import ApiError, header_too_large, malformed, timed_out, too_large
from quire.server.options import ServerOptions

MAX_HEADERS = 100
MAX_URL_BYTES = 8192
VERSIONS = ("1.0", "1.1")
# Closing on a client that still sends resets the connection, and may lose the answer on its way.
LINGER_S = 2.0
OFFERS = (b"connection", b"upgrade", b"http2-settings")


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools, which has no bounds of its own."""

    options: ServerOptions

    def connection_made(self, transport: Any) -> None:
        """Begin; a connection that sends nothing is closed."""
        super().connection_made(transport)
        self._loose_bytes = 0  # since the last head ended, or the last piece of a body came
        self._in_head = True
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._close_after(self.options.idle_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what is no body: heads, sizes of chunks and trailers that never end are refused."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        # In pieces: what follows the end of a head in the same piece is not counted.
        step = self.options.max_header_bytes
        for begin in range(0, len(data), step):
            self._take(data[begin : begin + step])
            if self._refused:
                return
            protocol: Any = self.transport.get_protocol()
            if protocol is not self:  # a WebSocket's from here on
                protocol.data_received(data[begin + step :])
                return

    def _take(self, data: bytes) -> None:
        if self._in_head and self._loose_bytes == 0:
            self._start_timer()
        self._loose_bytes += len(data)
        self._feed(data)
        if self._loose_bytes > self.options.max_header_bytes:
            self._refuse(header_too_large(self.options.max_header_bytes))

    def on_url(self, url: bytes) -> None:
        """Take the path."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refuse(malformed(f"the path is longer than {MAX_URL_BYTES} bytes"))

    def on_headers_complete(self) -> None:
        """Check what was sent before a request is made of it."""
        if self._refused or self._is_declined():
            return
        self._stop_timer()
        self._loose_bytes = 0
        self.scope["state"]["quire_hang_up"] = self.transport.abort
        error = self._head_error()
        if error is not None:
            self._refuse(error)
            return
        self._in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._loose_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Be ready for the next request on the connection."""
        if self._refused or self._is_declined():
            return
        self._stop_timer()
        self._loose_bytes = 0
        super().on_message_complete()
        self._in_head = True

    def on_response_complete(self) -> None:
        """Give a request that was answered before its end a while to end."""
        super().on_response_complete()
        if not self._in_head and self.cycle.response_complete:
            self._close_after(self.options.body_timeout_s)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._refused:
                return
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            else:
                self._parse_without_offer(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(malformed("the bytes cannot be parsed"))

    def _should_upgrade(self) -> bool:
        is_first = self.cycle is None or self.cycle.response_complete
        return is_first and self.parser.get_method() == b"GET" and super()._should_upgrade()

    def _is_declined(self) -> bool:
        """Whether the head offers a protocol that is not spoken here."""
        return bool(self.parser.should_upgrade()) and not self._should_upgrade()

    def _parse_without_offer(self, rest: bytes) -> None:
        """Begin the request again: its body is lost to a parser that saw an offer of HTTP/2.

        Java's client sends one with its first request.
        """
        head = self.parser.get_method() + b" " + self.url + b" HTTP/1.1\r\n"
        for name, value in self.headers:
            if name not in OFFERS:
                head += name + b": " + value + b"\r\n"
            elif name == b"connection" and b"close" in value.lower():
                head += b"connection: close\r\n"
        self.parser = httptools.HttpRequestParser(self)
        self._feed(head + b"\r\n" + rest)

    def _head_error(self) -> ApiError | None:
        if self.parser.get_http_version() not in VERSIONS:
            return malformed(f"the version is not one of {', '.join(VERSIONS)}")
        size = len(self.url) + sum(len(k) + len(v) + 4 for k, v in self.headers)
        if size > self.options.max_header_bytes or len(self.headers) > MAX_HEADERS:
            return header_too_large(self.options.max_header_bytes)
        names = [name for name, _ in self.headers]
        if b"content-length" in names and b"transfer-encoding" in names:
            return malformed("Content-Length and Transfer-Encoding exclude each other")
        for name, value in self.headers:
            if name == b"content-length" and int(value) > self.options.max_body_bytes:
                return too_large(self.options.max_body_bytes)
        return None

    def _refuse(self, error: ApiError) -> None:
        """Answer and close; what still arrives is dropped."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if not self._is_next():
            self._close_when_answered()
            return
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = error.body()
        reason = {400: "Bad Request", 408: "Request Timeout", 413: "Content Too Large"}
        status = f"HTTP/1.1 {error.status} {reason.get(error.status, 'Error')}\r\n"
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write((status + head + "connection: close\r\n\r\n").encode() + body)
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._close_after(LINGER_S)

    def _is_next(self) -> bool:
        """Whether what is refused is the next to be answered on the connection."""
        if self.cycle is None or self.cycle.response_complete:
            return self._in_head
        return not (self._in_head or self.pipeline or self.cycle.response_started)

    def _close_when_answered(self) -> None:
        if self.cycle.response_complete:
            self._close()
        self.cycle.keep_alive = False

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.options.header_timeout_s, self._time_out)

    def _close_after(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._refuse(timed_out("request's head"))

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def limited_protocol(options: ServerOptions) -> type[LimitedHttpProtocol]:
    """Return the protocol class that uvicorn makes one of for each connection."""
    return type("Protocol", (LimitedHttpProtocol,), {"options": options})
