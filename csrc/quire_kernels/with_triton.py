"""Modules of Triton kernels, imported when something is to run on a GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any


@functools.cache
def kernels(name: str) -> Any:
    """Return a module of this package, or None without Triton; found out once, not a call."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"quire_kernels.{name}")
