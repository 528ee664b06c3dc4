"""Figures of runs of one engine: throughput, latency of a token, a long prompt."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quire.benchmark.engine_run import EngineRun
from quire.benchmark.prompts import Lengths

if TYPE_CHECKING:
    from quire.execution.work import ModelWork

Figures = dict[str, float]
# A step counts as full when so large a share of the most sequences at once ran in it.
FULL_SHARE = 0.9


def offline_figures(run: EngineRun, work: ModelWork, *, on_gpu: bool) -> Figures:
    """Return the throughput of a run, and what its steps took."""
    num_computed = run.num_prompt_tokens + run.num_tokens
    flops = num_computed * work.linear_flops + run.num_tokens * work.head_flops
    figures = {
        "output_tokens_per_s": run.num_tokens / run.took_s,
        "total_tokens_per_s": num_computed / run.took_s,
        "seconds": run.took_s,
        "tflop_per_s": flops / run.took_s / 1e12,  # of linear layers and the head
        "output_tokens": float(run.num_tokens),
        "steps": float(run.num_steps),
        "step_ms": 1e3 * run.took_s / run.num_steps,
        "running_mean": statistics.fmean(run.num_seqs),
        "running_peak": float(max(run.num_seqs)),
        "preemptions": float(run.num_preemptions),
    }
    if on_gpu:  # on a CPU the host is the device
        figures["host_ms"] = 1e3 * statistics.fmean(run.host_s)
        figures["host_ms_full"] = 1e3 * statistics.median(_host_s_of_full_steps(run))
    return figures


def _host_s_of_full_steps(run: EngineRun) -> list[float]:
    """Return the host's time in steps of one token for nearly as many sequences as ever ran."""
    enough = FULL_SHARE * max(run.num_seqs)
    steps = zip(run.host_s, run.num_seqs, run.num_step_tokens, strict=True)
    full = [host_s for host_s, seqs, tokens in steps if seqs == tokens and seqs >= enough]
    return full or run.host_s


def latency_figures(run: EngineRun, stamps: Lengths, work: ModelWork) -> Figures:
    """Return the time of a token between the two that `stamps` counts, and to the first."""
    low, high = stamps.low, stamps.high
    token_s = (run.all_have(high) - run.all_have(low)) / (high - low)
    return {
        "ms_per_token": 1e3 * token_s,
        "ttft_ms": 1e3 * run.first_s,
        "output_tokens_per_s": len(run.token_s) / token_s,
        "weights_gb_per_s": work.weight_bytes / token_s / 1e9,
    }


def prefill_figures(run: EngineRun, work: ModelWork) -> Figures:
    """Return how long one prompt took, and how many FLOPs a second that was by shapes."""
    flops = work.prefill_flops(run.num_prompt_tokens)
    return {
        "seconds": run.took_s,
        "tokens_per_s": run.num_prompt_tokens / run.took_s,
        "tflop_per_s": flops / run.took_s / 1e12,
        "tflop": flops / 1e12,
        "steps": float(run.num_steps),
    }


def spread(runs: Sequence[Figures]) -> dict[str, dict[str, Any]]:
    """Return median, lowest and highest of each figure over the runs, and every value."""
    return {
        name: {
            "median": statistics.median(values),
            "low": min(values),
            "high": max(values),
            "values": values,
        }
        for name in runs[0]
        for values in [[run[name] for run in runs]]
    }
