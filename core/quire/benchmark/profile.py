"""Record some steps of an engine with PyTorch's profiler: a Chrome trace and a table."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define
from torch.profiler import ProfilerActivity, profile

from quire.benchmark.engine_run import Bench
from quire.benchmark.kernel_costs import KernelCosts, listening
from quire.benchmark.prompts import Work
from quire.benchmark.trace import Spent, on_device, on_host, products_of, read
from quire.errors import ConfigError

# Steps of one token a sequence, one after another, that make a steady state.
STEADY_STEPS = 4
MAX_ROWS = 40


def profile_steps(
    bench: Bench, works: Sequence[Work], path: Path, *, count: int, steady: bool
) -> dict[str, Any]:
    """Record up to `count` steps and write their trace into a folder that exists.

    `steady`: prompts are computed before, so that each step makes one token a sequence.
    Raises: ConfigError where the trace cannot be written.
    """
    device = bench.engine.runner.device
    recorded = _record(bench, works, count=count, steady=steady)
    _write(recorded.profiler, path)
    costs = KernelCosts()
    if device.type == "cuda":
        _ask_for_costs(bench, works, costs, count=count, steady=steady)
    return summarize(path, recorded.steps, recorded.took_s, costs, on_gpu=device.type == "cuda")


@define(kw_only=True)
class _Recorded:
    profiler: Any
    steps: int
    took_s: float


def _record(bench: Bench, works: Sequence[Work], *, count: int, steady: bool) -> _Recorded:
    """Run the works up to `count` steps behind what is not recorded, and end them."""
    engine = bench.engine
    ids = bench.add(works)
    if steady:
        _reach_steady_state(bench)
    activities, on_gpu = [ProfilerActivity.CPU], engine.runner.device.type == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    steps = 0
    with profile(activities=activities, record_shapes=True) as profiler:
        begin = time.perf_counter()
        while steps < count and engine.has_unfinished():
            engine.step()
            steps += 1
        if on_gpu:
            torch.cuda.synchronize()
        took_s = time.perf_counter() - begin
    _abandon(bench, ids)
    return _Recorded(profiler=profiler, steps=steps, took_s=took_s)


def _ask_for_costs(
    bench: Bench, works: Sequence[Work], costs: KernelCosts, *, count: int, steady: bool
) -> None:
    """Run the same steps again without replaying graphs, whose kernels tell nothing."""
    runner = bench.engine.runner
    with tempfile.TemporaryDirectory() as folder, runner.without_replays(), listening(costs):
        again = _record(bench, works, count=count, steady=steady)
        path = Path(folder) / "trace.json"
        again.profiler.export_chrome_trace(str(path))
        for name, product in products_of(read(path)):
            costs.add(name, flops=product.flops, num_bytes=product.num_bytes)


def _write(profiler: Any, path: Path) -> None:
    try:
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"--profile {path.parent} cannot be written: {error}.") from error


def _reach_steady_state(bench: Bench) -> None:
    engine, in_a_row = bench.engine, 0
    while in_a_row < STEADY_STEPS and engine.has_unfinished():
        engine.step()
        timing = engine.timing
        in_a_row = in_a_row + 1 if timing.num_tokens == timing.num_seqs else 0


def _abandon(bench: Bench, ids: Sequence[str]) -> None:
    """End what still runs, and collect the steps in flight."""
    for request_id in ids:
        bench.engine.abort(request_id)
    while bench.engine.has_unfinished():
        bench.engine.step()


def summarize(
    path: Path, steps: int, took_s: float, costs: KernelCosts, *, on_gpu: bool
) -> dict[str, Any]:
    """Return the table of a trace: times a step, by kernel on a GPU and by operator on a CPU."""
    events = read(path)
    timeline = on_device(events) if on_gpu else on_host(events)
    for spent in timeline.spent:
        cost = costs.of(spent.name, spent.calls)
        if cost is not None:
            spent.flops, spent.num_bytes = cost
    whole_us = 1e6 * took_s
    # On a GPU what lies between kernels; on a CPU what lies between operators.
    return {
        "trace": str(path),
        "steps": steps,
        "step_us": whole_us / steps,
        "busy_us": timeline.busy_us / steps,
        "gap_us": (timeline.span_us - timeline.busy_us) / steps,
        "rows": [_row(spent, steps, timeline.busy_us) for spent in timeline.spent[:MAX_ROWS]],
        "others_us": sum(spent.us for spent in timeline.spent[MAX_ROWS:]) / steps,
    }


def _row(spent: Spent, steps: int, busy_us: float) -> dict[str, Any]:
    us = max(spent.us, 1e-9)
    return {
        "name": spent.name,
        "calls_a_step": spent.calls / steps,
        "us_a_step": spent.us / steps,
        "us_a_call": spent.us / spent.calls,
        "share": spent.us / max(busy_us, 1e-9),
        "mb_a_call": None if spent.num_bytes is None else spent.num_bytes / spent.calls / 1e6,
        "mflop_a_call": None if spent.flops is None else spent.flops / spent.calls / 1e6,
        "tflop_per_s": None if spent.flops is None else spent.flops / us / 1e6,
        "gb_per_s": None if spent.num_bytes is None else spent.num_bytes / us / 1e3,
    }
