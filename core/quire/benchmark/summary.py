"""From results to figures: percentiles, throughput, goodput."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

from quire.benchmark.load import Result, Run
from quire.errors import ConfigError

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
# Name of a limit, and what of a result it bounds.
LIMITS = ("ttft", "tpot", "e2e")


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Return limits in seconds from texts such as `ttft:500`, in ms. Raises: ConfigError."""
    limits = {}
    for text in texts:
        name, _, number = text.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in LIMITS or not value > 0:
            raise ConfigError(
                f"--goodput is {text!r}; allowed: NAME:MS with NAME one of {', '.join(LIMITS)}, "
                "such as ttft:500."
            )
        limits[name] = value / 1000
    return limits


def meets(result: Result, limits: Mapping[str, float]) -> bool:
    """Whether a result keeps all limits."""
    took = {"ttft": result.first_s, "tpot": result.per_token_s or 0.0, "e2e": result.whole_s}
    return all(took[name] <= limit for name, limit in limits.items())


def summarize(run: Run, limits: Mapping[str, float]) -> dict[str, Any]:
    """Return the figures of a run; times in ms. Latencies are those of answered requests."""
    good = [result for result in run.results if result.error is None]
    errors = collections.Counter(result.error for result in run.results if result.error)
    took_s = run.took_s
    figures: dict[str, Any] = {
        "requests": len(run.results),
        "answered": len(good),
        "failed": len(run.results) - len(good),
        "errors": dict(errors.most_common(5)),
        "duration_s": took_s,
        "requests_per_s": len(good) / took_s,
        "prompt_tokens": sum(r.num_prompt_tokens for r in good),
        "cached_tokens": sum(r.num_cached_tokens for r in good),
        "output_tokens": sum(r.num_tokens for r in good),
        "output_tokens_per_s": sum(r.num_tokens for r in good) / took_s,
    }
    if limits:
        kept = sum(meets(result, limits) for result in good)
        figures["goodput_requests_per_s"] = kept / took_s
        figures["goodput_share"] = kept / max(1, len(run.results))
    latencies = {
        "ttft_ms": [r.first_s for r in good],
        "tpot_ms": [r.per_token_s for r in good if r.per_token_s is not None],
        "itl_ms": [gap for r in good for gap in r.gaps_s],
        "e2e_ms": [r.whole_s for r in good],
    }
    for name, values in latencies.items():
        figures[name] = _quantiles(values)
    return figures


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = {name: 1e3 * percentile(values, share) for name, share in QUANTILES.items()}
    return {"mean": 1e3 * sum(values) / len(values), **found}


def as_table(figures: Mapping[str, Any]) -> str:
    """Return the figures as lines of a table."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, float):
            lines.append(f"{name:<24}{value:>12.2f}")
        elif isinstance(value, int):
            lines.append(f"{name:<24}{value:>12}")
    lines.append("")
    lines.append(f"{'':<12}" + "".join(f"{name:>12}" for name in ("mean", *QUANTILES)))
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        found = figures[name]
        if found is not None:
            lines.append(f"{name:<12}" + "".join(f"{number:>12.2f}" for number in found.values()))
    lines += [f"{count} x {error}" for error, count in figures["errors"].items()]
    return "\n".join(lines)
