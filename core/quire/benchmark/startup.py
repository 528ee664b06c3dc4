"""Start an engine in fresh processes and gather what each part of the start took. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire.benchmark.figures import Figures, spread
from quire.benchmark.first_token import PROGRAM
from quire.errors import ConfigError, QuireError

# Where compiled kernels are kept; a cold start finds these folders empty.
CACHE_VARIABLES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}


def measure_starts(
    options: Mapping[str, Any], caches: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Return figures in seconds by cache and part, with the machine and the choices.

    `cold`: each start has new and empty folders for compiled kernels. `warm`: the user's own, which
    one start fills before the others are measured. Nothing is removed. Raises: QuireError.
    """
    figures: dict[str, Any] = {}
    told: dict[str, Any] = {}
    for cache in caches:
        if cache == "warm":
            _say(cache, "filling")
            _start(options, os.environ)
        found = []
        for number in range(repeats):
            _say(cache, f"{number + 1} of {repeats}")
            told = _cold_start(options) if cache == "cold" else _start(options, os.environ)
            found.append(_seconds_of(told, cache))
        figures.update(spread(found))
    return {"machine": told["machine"], "choices": told["choices"], "figures": figures}


def _say(cache: str, what: str) -> None:
    print(f"{cache} start, {what} ...", file=sys.stderr)


def _cold_start(options: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder:
        empty = {name: str(Path(folder) / own) for name, own in CACHE_VARIABLES.items()}
        return _start(options, {**os.environ, **empty})


def _start(options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(options),
        stdout=subprocess.PIPE,
        text=True,
        env=dict(environment),
        check=False,
    )
    lines = done.stdout.splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise QuireError(
            f"the process that was started ended with code {done.returncode} and told nothing."
        ) from None
    if "error" in found:
        kind = ConfigError if found["exit_code"] == ConfigError.exit_code else QuireError
        raise kind(f"the engine did not start: {found['error']}")
    return found


def _seconds_of(told: Mapping[str, Any], cache: str) -> Figures:
    """Return the parts, what lies between them, and the whole."""
    parts = dict(told["phases_s"])
    whole = {"between": told["whole_s"] - sum(parts.values()), "whole": told["whole_s"]}
    return {f"{cache}: {name}": seconds for name, seconds in {**parts, **whole}.items()}
