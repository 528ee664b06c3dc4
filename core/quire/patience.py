"""Say what is being waited for, where a plugin takes long or never comes back."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from attrs import define

# Longer than any of it takes, shorter than people wait before they look for the cause.
PATIENCE_S = 20.0


@define
class Wait:
    """What is being done: who does it may say so as it changes, at the price of a store."""

    words: str | Callable[[], str]


@contextlib.contextmanager
def telling(words: str | Callable[[], str] = "", *, after_s: float | None = None) -> Iterator[Wait]:
    """Print one line on stderr where the body runs for `after_s` seconds, PATIENCE_S if None.

    The words complete "still waiting for"; a function that returns them is asked when it is time.
    """
    wait = Wait(words)
    seconds = PATIENCE_S if after_s is None else after_s
    timer = threading.Timer(seconds, _tell, (wait, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield wait
    finally:
        timer.cancel()


def _tell(wait: Wait, seconds: float) -> None:
    """Print what is waited for; a process that hangs is ended by whoever reads it."""
    words = wait.words if isinstance(wait.words, str) else wait.words()
    print(
        f"quire: still waiting for {words} after {seconds:g} s; Ctrl-C ends it",
        file=sys.stderr,
        flush=True,
    )
