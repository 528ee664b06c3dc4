"""How long each part of a start took: noted where it happens, told by every door."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from attrs import Factory, define

from quire.patience import telling

# Weights may well take that long.
PHASE_PATIENCE_S = 60.0


@define
class Phases:
    """Seconds by the name of a part, in the order in which the parts began."""

    seconds: dict[str, float] = Factory(dict)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what the body takes to a part; parts are not nested."""
        begin = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        try:
            with telling(f"{name!r}, a part of the start,", after_s=PHASE_PATIENCE_S):
                yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def __str__(self) -> str:
        """Return the parts that took a tenth of a second or more, as people read them."""
        parts = [f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items()]
        return ", ".join(part for part in parts if not part.endswith(" 0.0 s"))
