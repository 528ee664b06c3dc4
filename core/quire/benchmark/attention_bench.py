"""`quire bench attention`: every backend on the same inputs, how fast and how right."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from attrs import Factory, asdict, frozen

from quire.benchmark.attention_inputs import Inputs, Workload
from quire.benchmark.attention_shapes import Shape, seen_keys, seen_pairs
from quire.benchmark.attention_truth import Truth
from quire.benchmark.machine import describe, measure_ceilings
from quire.benchmark.timing import measure, rotated_bytes
from quire.execution.memory import describe_bytes, host_memory_left
from quire.execution.setup import pick_device, set_threads
from quire.interfaces.attention import AttentionBackend, AttentionSpec

PLANS = 5


@frozen(kw_only=True)
class Contender:
    """A backend that is asked for: its class and options, or why it cannot take part."""

    name: str
    backend: type[AttentionBackend] | None = None
    options: dict[str, Any] = Factory(dict)
    reason: str = ""


@torch.inference_mode()
def run(
    contenders: Sequence[Contender], shapes: Sequence[Shape], spec: AttentionSpec, seed: int
) -> dict[str, Any]:
    """Measure all and return the report; a backend that fails has a row that says why."""
    device = torch.device(spec.device)
    ceilings = measure_ceilings(device, getattr(torch, spec.dtype))
    rows = [
        _row(contender.name, None, "not usable", why=contender.reason)
        for contender in contenders
        if contender.backend is None
    ]
    able = [contender for contender in contenders if contender.backend is not None]
    for shape in shapes:
        rows += _measure_shape(able, shape, spec, seed)
    for row in rows:
        if row["us"] is not None:
            _add_rates(row, ceilings)
    return {
        "benchmark": "attention",
        "spec": asdict(spec),
        "machine": describe(device),
        "rotated_bytes": rotated_bytes(device),
        "seed": seed,
        "ceilings": ceilings,
        "rows": rows,
    }


def _measure_shape(
    contenders: Sequence[Contender], shape: Shape, spec: AttentionSpec, seed: int
) -> list[dict[str, Any]]:
    device, rows = torch.device(spec.device), []
    try:
        _check_memory(shape, spec)
        inputs = Inputs.draw(shape, spec, seed)
        truth = Truth(inputs) if contenders else None
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        why = f"the inputs do not fit: {_first_line(error)}"
        return [_row(one.name, shape, "failed", why=why) for one in contenders]
    for one in contenders:
        print(f"{shape.text}, {one.name} ...", file=sys.stderr)
        assert truth is not None, "there is a contender"
        try:
            row = _measured(one, inputs, truth, device)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a backend raises is its row
            row = _row(one.name, shape, "failed", why=_first_line(error))
        rows.append(row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _check_memory(shape: Shape, spec: AttentionSpec) -> None:
    """Raise MemoryError where a host would swap; a GPU says so itself."""
    if spec.device != "cpu":
        return
    tokens = sum(length for _, length in shape.rows)
    element = 4 if spec.dtype == "float32" else 2
    width = spec.num_kv_heads * (spec.head_dim + spec.value_head_dim)
    # Keys and values as they are drawn, and the cache.
    needed, left = 2 * tokens * width * element, host_memory_left()
    if needed > left // 2:
        raise MemoryError(
            f"{describe_bytes(needed)} of keys and values, and {describe_bytes(left)} are free"
        )


def _measured(one: Contender, inputs: Inputs, truth: Truth, device: torch.device) -> dict[str, Any]:
    """Run once and judge, then time."""
    assert one.backend is not None, "it can take part"
    shape, spec = inputs.shape, inputs.spec
    workload = Workload(one.backend, one.options, inputs)
    judged = truth.judge(workload.attend_once())
    copies = workload.make_copies(rotated_bytes(device))
    times = measure(workload.attend, copies, device)
    window = spec.sliding_window
    element = getattr(torch, spec.kv_dtype).itemsize
    width = spec.num_kv_heads * (spec.head_dim + spec.value_head_dim) * element
    pair = 2 * spec.num_heads * (spec.head_dim + spec.value_head_dim)
    return {
        **_row(one.name, shape, "right" if judged.of_bound <= 1 else "WRONG"),
        "us": 1e6 * times.median,
        "us_low": 1e6 * times.low,
        "us_high": 1e6 * times.high,
        "how": times.how,
        "plan_us": 1e6 * _plan_seconds(workload, device),
        "copies": copies,
        "kv_bytes": seen_keys(shape.rows, window) * width,
        "flops": seen_pairs(shape.rows, window) * pair,
        # JSON has no infinity: a NaN in the output has no error but a verdict.
        "error": judged.error if math.isfinite(judged.error) else None,
        "bound": judged.bound,
        "error_of_bound": judged.of_bound if math.isfinite(judged.error) else None,
    }


def _plan_seconds(workload: Workload, device: torch.device) -> float:
    """Return the time of the plan and its device part, once a step."""
    taken = []
    for _ in range(PLANS):
        begin = time.perf_counter()
        workload.plan()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _row(name: str, shape: Shape | None, verdict: str, *, why: str = "") -> dict[str, Any]:
    return {
        "backend": name,
        "shape": "" if shape is None else shape.text,
        "kind": "" if shape is None else shape.kind,
        "num_seqs": None if shape is None else len(shape.rows),
        "longest": None if shape is None else shape.longest,
        "verdict": verdict,
        "why": why,
        "us": None,
    }


def _add_rates(row: dict[str, Any], ceilings: dict[str, float]) -> None:
    """Add rates, and the share of the ceiling that is nearer: reading or multiplying."""
    row["tb_per_s"] = row["kv_bytes"] / row["us"] / 1e6
    row["tflop_per_s"] = row["flops"] / row["us"] / 1e6
    shares = {
        "copy": row["tb_per_s"] / ceilings["copy_tb_per_s"],
        "product": row["tflop_per_s"] / ceilings["product_tflop_per_s"],
    }
    row["bound_by"] = max(shares, key=shares.__getitem__)
    row["of_ceiling"] = shares[row["bound_by"]]


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def prepare_device(wanted: str, num_threads: int | None) -> str:
    """Return `cpu` or `cuda`, with threads as an engine has them. Raises: ConfigError."""
    device = pick_device(wanted).type
    if device == "cpu":
        set_threads(num_threads)
    return device


def has_failed(report: dict[str, Any]) -> bool:
    """Whether a backend that took part failed or is wrong, or none took part."""
    verdicts = [row["verdict"] for row in report["rows"]]
    return "right" not in verdicts or any(v in ("WRONG", "failed") for v in verdicts)
