"""Reading a body: bounds while it arrives, not after."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from quire.server.errors import timed_out, too_large, unsupported_media_type

TOTAL_PAUSES = 6  # a whole body may take so many of the longest pauses
MIN_BYTES_PER_S = 1024  # what comes more slowly is a client that only wants to hold a connection


class Disconnected(Exception):
    """Report a client that went away before its request was complete."""


async def read_body(
    receive: Any, *, limit: int, pause_s: float, content_type: bytes | None
) -> bytes:
    """Return the body. Raises: ApiError 408, 413 or 415; Disconnected."""
    _check_type(content_type)
    try:
        async with asyncio.timeout(TOTAL_PAUSES * pause_s):
            return await _read(receive, limit, pause_s)
    except TimeoutError:
        raise timed_out("body") from None


async def _read(receive: Any, limit: int, pause_s: float) -> bytes:
    parts: list[bytes] = []
    size = 0
    begin_s = time.monotonic()
    while True:
        left_s = begin_s + pause_s + size / MIN_BYTES_PER_S - time.monotonic()
        async with asyncio.timeout(min(pause_s, left_s)):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large(limit)
        if not message.get("more_body"):
            return b"".join(parts)


def _check_type(content_type: bytes | None) -> None:
    kind = (content_type or b"application/json").partition(b";")[0].strip().lower()
    if kind != b"application/json" and not kind.endswith(b"+json"):
        raise unsupported_media_type(kind.decode("latin-1"))
