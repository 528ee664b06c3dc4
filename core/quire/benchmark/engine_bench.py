"""The benchmarks of an engine in this process: warm up, repeat, and gather a report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from quire.benchmark.engine_run import Bench, EngineRun
from quire.benchmark.figures import (
    Figures,
    latency_figures,
    offline_figures,
    prefill_figures,
    spread,
)
from quire.benchmark.machine import describe, measure_ceilings
from quire.benchmark.profile import profile_steps
from quire.benchmark.prompts import Lengths, check_fits, draw_prompts
from quire.benchmark.report import add_shares, reached
from quire.execution.work import ModelWork, work_of
from quire.llm import LLM

if TYPE_CHECKING:
    from quire.frontend import Frontend

# Tokens that each request generates in the warm-up of a run of many.
WARM_UP_TOKENS = 16


@frozen(kw_only=True)
class Plan:
    """What is asked of a benchmark. `lengths` are (prompt, answer) of each request."""

    what: str
    lengths: list[tuple[int, int]]
    temperature: float
    repeats: int
    seed: int
    workload: dict[str, Any]
    stamps: Lengths
    ceilings: bool | None = None
    profile: Path | None = None
    profile_steps: int = 8


def measure(frontend: Frontend, plan: Plan) -> dict[str, Any]:
    """Load the model, run the plan and return the report. Raises: QuireError."""
    device = _device(frontend)
    wanted = device.type == "cuda" if plan.ceilings is None else plan.ceilings
    # Before the engine takes the device's memory.
    ceilings = measure_ceilings(device) if wanted else None
    llm = LLM.from_frontend(frontend)
    check_fits(plan.lengths, llm.engine.max_model_len)
    bench = Bench(llm, plan.temperature)
    figures = _repeat(bench, plan, _model_work(llm))
    profiled = None if plan.profile is None else _profile(bench, plan, plan.profile)
    if profiled is not None and ceilings is not None:
        add_shares(profiled["rows"], ceilings)
    settings = llm.engine.config.to_options()
    return {
        "benchmark": plan.what,
        "model": frontend.prepared.describe(),
        "machine": describe(llm.engine.runner.device),
        "choices": {choice.kind: choice.used for choice in llm.engine.selections},
        "settings": {name: value for name, value in settings.items() if name != "model"},
        "workload": {**plan.workload, "repeats": plan.repeats, "seed": plan.seed},
        "start_s": frontend.prepared.phases.seconds,
        "figures": figures,
        "ceilings": ceilings,
        "reached": reached(plan.what, figures, ceilings) if ceilings else None,
        "profile": profiled,
    }


def _profile(bench: Bench, plan: Plan, folder: Path) -> dict[str, Any]:
    vocab_size = bench.engine.runner.vocab_size
    works = draw_prompts(plan.lengths, vocab_size=vocab_size, seed=f"{plan.seed} profile")
    path = folder / f"{plan.what}.json"
    steady = plan.what != "prefill"
    return profile_steps(bench, works, path, count=plan.profile_steps, steady=steady)


def _device(frontend: Frontend) -> torch.device:
    options = frontend.config.device
    use_gpu = options.device != "cpu" and torch.cuda.is_available()
    if not use_gpu and options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    return torch.device("cuda" if use_gpu else "cpu")


def _model_work(llm: LLM) -> ModelWork:
    layout = llm.engine.layout
    return work_of(llm.engine.runner.model, layout.groups, layout.budget.weights)


def _repeat(bench: Bench, plan: Plan, work: ModelWork) -> dict[str, Any]:
    """Warm up, then measure as often as the plan says, each time with other prompts."""
    figures_of = _figures_of(bench, plan, work)
    vocab_size = bench.engine.runner.vocab_size
    print("warming up ...", file=sys.stderr)
    lengths = _warm_up_lengths(plan)
    bench.run(draw_prompts(lengths, vocab_size=vocab_size, seed=f"{plan.seed} warm-up"))
    found = []
    for number in range(plan.repeats):
        print(f"measuring, {number + 1} of {plan.repeats} ...", file=sys.stderr)
        seed = f"{plan.seed} {number}"
        run = bench.run(draw_prompts(plan.lengths, vocab_size=vocab_size, seed=seed))
        found.append(figures_of(run))
    return spread(found)


def _warm_up_lengths(plan: Plan) -> list[tuple[int, int]]:
    """Return the plan's own requests; many end early, one after another, as they would later."""
    if len(plan.lengths) == 1:
        return plan.lengths
    return [
        (length, min(num_tokens, 1 + number % WARM_UP_TOKENS))
        for number, (length, num_tokens) in enumerate(plan.lengths)
    ]


def _figures_of(bench: Bench, plan: Plan, work: ModelWork) -> Callable[[EngineRun], Figures]:
    on_gpu = bench.engine.runner.device.type == "cuda"
    if plan.what == "offline":
        return lambda run: offline_figures(run, work, on_gpu=on_gpu)
    if plan.what == "latency":
        return lambda run: latency_figures(run, plan.stamps, work)
    return lambda run: prefill_figures(run, work)
