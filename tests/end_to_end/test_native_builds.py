"""Kernels that are not built: passed over by `auto`, built beside a start or before it by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quire_kernels.native import CXX

NEEDS_COMPILER = pytest.mark.skipif(
    CXX.why_missing() is not None, reason=f"there is no compiler: {CXX.why_missing()}"
)
SMALL = ["--num-threads", "1", "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "8"]
GENERATE = ["generate", "demo", "-p", "A latte", "--max-tokens", "4", "--temperature", "0", *SMALL]
FAILING = """#!/bin/sh
echo 'a.cpp: In function f:' >&2
echo 'a.cpp:7:3: error: this compiler only fails' >&2
echo 'a.cpp:9:1: error: and again' >&2
exit 1
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a machine on which nothing was built."""
    own = {name: value for name, value in os.environ.items() if name != "CXX"}
    return {**own, "OMP_NUM_THREADS": "1", "QUIRE_CACHE_DIR": str(tmp_path / "cache")}


@pytest.fixture
def failing(tmp_path: Path, environment: dict[str, str]) -> dict[str, str]:
    """Return the same with a compiler that fails."""
    compiler = tmp_path / "failing-c++"
    compiler.write_text(FAILING)
    compiler.chmod(0o755)
    return {**environment, "CXX": str(compiler)}


def quire(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `quire` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "quire", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


def attention(environment: dict[str, str], *options: str) -> tuple[str, dict[str, str]]:
    """Return the backend that a start would use, and why others were passed over."""
    found = quire(environment, "explain", "demo", "--json", *SMALL, *options)
    assert found.returncode == 0, found.stderr
    choices: list[dict[str, Any]] = json.loads(found.stdout)["choices"]
    [choice] = [choice for choice in choices if choice["kind"] == "attention"]
    return choice["used"], {each["name"]: each["why"] for each in choice["passed_over"]}


def wait_for(folder: Path, pattern: str, seconds: float) -> Path:
    """Return the first file that appears in a folder."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for found in folder.glob(pattern):
            return found
        time.sleep(0.1)
    raise AssertionError(f"no {pattern} in {folder}: {list(folder.glob('*'))}")


def test_auto_without_a_compiler_falls_back_and_says_why(environment: dict[str, str]) -> None:
    used, passed_over = attention({**environment, "PATH": "nowhere"})

    assert used == "sdpa"
    assert passed_over["cpu"].startswith("it is not built, and there is no C++ compiler (g++, ")


@NEEDS_COMPILER
def test_auto_passes_over_what_is_not_built_and_says_how(environment: dict[str, str]) -> None:
    used, passed_over = attention(environment)

    assert (used, passed_over["cpu"]) == ("sdpa", "not built; run `quire build cpu`.")
    assert not Path(environment["QUIRE_CACHE_DIR"]).exists(), "explain builds nothing"


def test_explicit_backend_whose_build_fails_ends_the_start_with_the_first_error(
    failing: dict[str, str],
) -> None:
    first = quire(failing, *GENERATE, "--attention-backend", "cpu")
    again = quire(failing, *GENERATE, "--attention-backend", "cpu")

    assert (first.returncode, again.returncode) == (1, 2)
    said = "failing-c++ failed: a.cpp:7:3: error: this compiler only fails"
    assert f"attention 'cpu' cannot be built: {said}. All that it said is in " in first.stderr
    assert "and again" not in first.stderr
    assert f"its last build failed: {said}; `quire build` tries again" in again.stderr


@pytest.mark.slow
def test_auto_goes_on_where_the_build_beside_it_fails_and_says_so_the_next_time(
    failing: dict[str, str],
) -> None:
    found = quire(failing, *GENERATE)
    wait_for(Path(failing["QUIRE_CACHE_DIR"]) / "native", "*.failed", 60)

    assert found.returncode == 0, found.stderr
    used, passed_over = attention(failing)
    assert used == "sdpa"
    assert "this compiler only fails" in passed_over["cpu"]


@NEEDS_COMPILER
@pytest.mark.slow
def test_start_that_passed_the_kernels_over_builds_them_for_the_next(
    environment: dict[str, str],
) -> None:
    first = quire(environment, *GENERATE)
    assert first.returncode == 0, first.stderr

    wait_for(Path(environment["QUIRE_CACHE_DIR"]) / "native", "cpu-*.sha256", 240)

    assert attention(environment)[0] == "cpu"
    assert quire(environment, *GENERATE).returncode == 0


@NEEDS_COMPILER
@pytest.mark.slow
def test_explicit_backend_that_is_not_built_is_built_at_the_start(
    environment: dict[str, str],
) -> None:
    found = quire(environment, *GENERATE, "--attention-backend", "cpu")

    assert found.returncode == 0, found.stderr
    lines = found.stderr.splitlines()
    assert "quire: cpu: not built yet; building it now, once" in lines
    assert any(line.startswith("quire: cpu: compiled in ") for line in lines)
    assert attention(environment)[0] == "cpu"
