"""Quantize a folder and print, as JSON, the most memory that no file is behind, in bytes.

Arguments: the model's folder, the method, the output folder, and a calibration file or "".
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch

from quire.cli.main import main


def anonymous() -> int:
    """Return the bytes in memory that no file is behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def watch(seen: list[int], done: threading.Event) -> None:
    """Look every few milliseconds."""
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.002)


def measure() -> None:
    """Run once on a small model, so that code is loaded, then on the other."""
    small, large, method, output, calibration = sys.argv[1:]
    given = ["--method", method, "--device", "cpu", "--num-threads", "1", "--num-samples", "4"]
    given += ["--calibration", calibration] if calibration else ["--group-size", "32"]
    torch.set_num_threads(1)
    assert main(["quantize", small, *given, "--output", f"{output}-small"]) == 0
    seen, done = [anonymous()], threading.Event()
    watcher = threading.Thread(target=watch, args=(seen, done))
    watcher.start()
    assert main(["quantize", large, *given, "--output", output]) == 0
    done.set()
    watcher.join()
    print(json.dumps({"before": seen[0], "peak": max(seen)}))


if __name__ == "__main__":
    measure()
