"""Ends connections whose client takes nothing of what was written for it.

What was written stays in the connection's buffer until then, also after its request has ended.
Under TLS only what is not encrypted yet can be seen: a whole answer ends there with the idle
timeout and TLS's own for its end, 30 s.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection
from typing import Any

PERIOD_S = 1.0


class SlowReaders:
    """Looks at every connection's buffer again and again; `connections` have a `transport`."""

    def __init__(self, connections: Collection[Any], timeout_s: float) -> None:
        self._connections = connections
        self._timeout_s = timeout_s
        # Of those with something in their buffer: how much, and since when it is no less.
        self._waiting: dict[Any, tuple[float, float]] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(min(PERIOD_S, self._timeout_s / 4))
            self.look(time.monotonic())

    def look(self, now_s: float) -> None:
        """End those whose buffer has not become smaller for too long."""
        waiting = {}
        for connection in tuple(self._connections):
            size = connection.transport.get_write_buffer_size()
            last_size, since_s = self._waiting.get(connection, (math.inf, now_s))
            if size < last_size:
                since_s = now_s
            if size and now_s - since_s > self._timeout_s:
                connection.transport.abort()
            elif size:
                waiting[connection] = (size, since_s)
        self._waiting = waiting
