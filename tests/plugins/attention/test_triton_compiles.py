"""The kernels compile for a GPU that is not here; the interpreter lets more through."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HAS_COMPILER = importlib.util.find_spec("triton.backends.nvidia") is not None


@pytest.mark.skipif(not HAS_COMPILER, reason="this Triton has no compiler for NVIDIA GPUs")
def test_kernels_of_a_llama_compile_for_an_h100_without_spills() -> None:
    script = ROOT / "tests/benchmarks/compile_attention.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    done = subprocess.run(
        [sys.executable, str(script), "--hot"], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 2 + 2 * 6
