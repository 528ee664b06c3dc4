"""Loading takes the model's own size and at most its largest tensor of anonymous memory."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from load_and_measure import tensor_shapes
from safetensors_files import entry, file_bytes

MIB = 1 << 20
# Temporary memory of the check for NaN (CHECKED_ELEMENTS at a time) and of the allocator.
CONSTANT = 48 * MIB


def write_sparse(folder: Path, dtype: str, size: int) -> int:
    """Write a checkpoint of zeros that takes no room on the disk; return its bytes."""
    header, end = {}, 0
    for name, shape in tensor_shapes().items():
        begin, end = end, end + math.prod(shape) * size
        header[name] = entry(dtype, shape, begin, end)
    file = folder / "model.safetensors"
    file.write_bytes(file_bytes(header, b""))
    os.truncate(file, file.stat().st_size + end)
    return end


@pytest.mark.parametrize(
    ("stored", "size", "wanted"),
    [("F32", 4, "float32"), ("F32", 4, "bfloat16")],
)
def test_peak_anonymous_memory_is_at_most_one_tensor_above_the_model(
    tmp_path: Path, stored: str, size: int, wanted: str
) -> None:
    write_sparse(tmp_path, stored, size)
    script = Path(__file__).with_name("load_and_measure.py")

    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), wanted], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] > 130 * MIB
    assert found["samples"] > 20, "too few samples to see a peak"
    assert max(found["peak"], found["after"]) >= 0.95 * found["model"]
    assert found["peak"] <= found["model"] + found["largest"] + CONSTANT, found
    # What stays is the model, once.
    assert found["after"] <= found["model"] + CONSTANT, found
