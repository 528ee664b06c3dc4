"""`quire serve demo` in front of the fake engine; says at its end where its time went."""

from __future__ import annotations

import collections
import json
import signal
import sys
import time
from types import FrameType
from typing import Any

from quire.config import EngineConfig
from quire.frontend import Frontend
from quire.server.options import ServerOptions
from quire.server.run import serve

PERIOD_S = 0.002
# The innermost frame of these files, first match first, says what the time went to.
PARTS = (
    ("text", ("quire/text/",)),
    ("answers", ("server/answers", "server/answer_", "server/sources", "server/event_stream")),
    ("streams", ("server/stream", "server/generation", "server/async_engine")),
    ("metrics", ("server/metrics", "prometheus_client")),
    ("messages", ("server/engine_client", "server/messages", "zmq/")),
    ("requests", ("quire/server/", "starlette/", "fastapi/")),
    ("http", ("uvicorn/",)),
)


class Samples:
    """Where the main thread is, looked at by processor time."""

    def __init__(self) -> None:
        self.parts: collections.Counter[str] = collections.Counter()
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, PERIOD_S, PERIOD_S)

    def _look(self, _number: int, frame: FrameType | None) -> None:
        while frame is not None:
            name = frame.f_code.co_filename
            for part, places in PARTS:
                if any(place in name for place in places):
                    self.parts[part] += 1
                    return
            frame = frame.f_back
        self.parts["event loop"] += 1


def main() -> int:
    """Serve until a signal comes; print one line of JSON."""
    options: dict[str, Any] = {"port": 0, "max_queued_requests": 4096, "log_level": "info"}
    frontend = Frontend(EngineConfig.from_options({"model": "demo", "max_num_seqs": 256}))
    samples = Samples() if "--profile" in sys.argv else None
    begin_s = time.process_time()
    code = serve(frontend, ServerOptions.from_options(options), module="fake_engine")
    signal.setitimer(signal.ITIMER_PROF, 0)
    parts = dict(samples.parts) if samples is not None else {}
    print(json.dumps({"cpu_s": time.process_time() - begin_s, "parts": parts}))
    return code


if __name__ == "__main__":
    sys.exit(main())
