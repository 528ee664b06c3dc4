"""Quantizing takes the memory of one block, not of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import write_model

MIB = 1 << 20
LARGE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 16}
BLOCK = 4 * (3 * 384 * 384 + 3 * 384 * 1024)  # grouped heads: k and v have half the rows
MOST = 6 * BLOCK + 24 * MIB


@pytest.mark.parametrize(
    "method", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("gptq", "awq")), "int4"]
)
def test_memory_is_that_of_a_block(tmp_path: Path, calibration: Path, method: str) -> None:
    small = write_model(tmp_path / "small", hidden_size=128, intermediate_size=128)
    large = write_model(tmp_path / "large", **LARGE)
    script = Path(__file__).with_name("measure_quantize.py")
    file = "" if method == "int4" else str(calibration)

    done = subprocess.run(
        [sys.executable, script, small, large, method, tmp_path / "out", file],
        capture_output=True,
        text=True,
        # What is freed goes back to the system, so that only what is used is counted.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)},
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # The block itself, its largest layer wide some times over, and the moments of its inputs.
    assert found["peak"] - found["before"] <= MOST, found
    # Were the model's weights all in memory, it would be seen.
    assert 16 * BLOCK > 1.5 * MOST
