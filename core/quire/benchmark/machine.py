"""The machine that was measured, and how fast it copies and multiplies: what bounds an engine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional

ROUNDS = 10
WARM_UP_ROUNDS = 3
# No call more once so many seconds are gone: a CPU without products in a dtype takes minutes.
MOST_SECONDS = 2.0


def describe(device: torch.device) -> dict[str, Any]:
    """Return the names and versions that a figure depends on."""
    found: dict[str, Any] = {"device": _name(device), "torch": torch.__version__}
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    else:
        found["threads"] = torch.get_num_threads()
        found["cores"] = len(os.sched_getaffinity(0))
    return found


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def measure_ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Measure what the device can do at best.

    `copy_tb_per_s` counts what is read and what is written; `one_row_tb_per_s` is a product of
    one row by a large weight of `dtype`, of which only the weight counts; `product_tflop_per_s` is
    a square product in `dtype`, on a CPU in float32 where that is faster.
    """
    on_gpu = device.type == "cuda"
    num_bytes, size, rows = (1 << 30, 8192, 32768) if on_gpu else (1 << 27, 1024, 4096)
    found = {
        "copy_tb_per_s": _copy(device, num_bytes),
        "one_row_tb_per_s": _one_row(device, dtype, rows, size),
        "product_tflop_per_s": _product(device, dtype, size),
    }
    if not on_gpu:  # some processors have no instructions for 16 bits, and PyTorch no fast product
        wide = _product(device, torch.float32, size)
        found["product_tflop_per_s"] = max(found["product_tflop_per_s"], wide)
    if on_gpu:
        torch.cuda.empty_cache()
    return found


def _copy(device: torch.device, num_bytes: int) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda: target.copy_(source), device) / 1e12


def _one_row(device: torch.device, dtype: torch.dtype, rows: int, size: int) -> float:
    weight = torch.randn(rows, size, dtype=dtype, device=device)
    x = torch.randn(1, size, dtype=dtype, device=device)
    took_s = _seconds(lambda: functional.linear(x, weight), device)
    return weight.numel() * weight.element_size() / took_s / 1e12


def _product(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda: a @ b, device) / 1e12


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a call on the device; the first few do not count, if they may."""
    begin = time.perf_counter()
    times: list[float] = []
    while len(times) < WARM_UP_ROUNDS + ROUNDS:
        times.append(_seconds_once(call, device))
        if device.type != "cuda" and time.perf_counter() - begin > MOST_SECONDS:
            break
    return statistics.median(times[WARM_UP_ROUNDS:] or times[-1:])


def _seconds_once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
