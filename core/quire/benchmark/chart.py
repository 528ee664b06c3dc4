"""A picture of a run: how latencies are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quire.benchmark.load import Result
from quire.errors import ConfigError


def draw(results: Sequence[Result], path: Path) -> None:
    """Write the share of requests below each latency; the suffix chooses the format.

    Raises: ConfigError without matplotlib, or where the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib; install it with `pip install 'quire[bench]'`."
        ) from error
    good = [result for result in results if result.error is None]
    latencies = {
        "time to first token": [r.first_s for r in good],
        "time per output token": [r.per_token_s for r in good if r.per_token_s is not None],
        "between chunks": [gap for r in good for gap in r.gaps_s],
        "whole request": [r.whole_s for r in good],
    }
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in latencies.items():
        ordered = sorted(1e3 * value for value in values)
        shares = [(number + 1) / len(ordered) for number in range(len(ordered))]
        axes.step(ordered, shares, where="post", label=name)
    axes.set(xscale="log", xlabel="ms", ylabel="share that took no longer", ylim=(0, 1))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}.") from error
