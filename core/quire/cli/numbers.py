"""Numbers of the command line that are no settings of an engine, with their bounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


def number(kind: Callable[[str], Any], low: float, above: bool = False) -> Callable[[str], Any]:
    """Return what turns a text into a number from `low`, or above it."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not math.isfinite(value) or value < low or (above and value == low):
            raise argparse.ArgumentTypeError(
                f"{text} is out of range; allowed: numbers {'above' if above else 'from'} {low:g}"
            )
        return value

    convert.__name__ = getattr(kind, "__name__", "number")
    return convert


COUNT, POSITIVE = number(int, 1), number(float, 0, above=True)
