"""The kernels of mixtures compile for a GPU that is not here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HAS_COMPILER = importlib.util.find_spec("triton.backends.nvidia") is not None


@pytest.mark.skipif(not HAS_COMPILER, reason="this Triton has no compiler for NVIDIA GPUs")
def test_kernels_of_mixtures_compile_for_an_h100_without_spills() -> None:
    script = ROOT / "tests/benchmarks/compile_experts.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    # One token takes 3 kernels, some 5, and many 5 or, where the plan is made in two launches, 6.
    assert done.stdout.count("\n") == 1 + (3 + 5 + 6) + (3 + 5 + 5)
