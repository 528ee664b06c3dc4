"""The C++ kernels for a CPU, where they are built."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def kernels() -> Any:
    """Return the module of kernels of rows, or None where they are not built; found out once."""
    rows = importlib.import_module("quire_kernels.cpu.rows")
    return rows if rows.is_built() else None
