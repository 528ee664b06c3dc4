"""A picture of attention: bandwidth against context length and batch, products against tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

FORMATS = (".png", ".svg")


def check(path: Path) -> None:
    """Raise ConfigError where no picture could be written to the path, before anything is timed."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: write a name that ends in {' or '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}; make it first.")
    try:
        import matplotlib as _  # noqa: F401 - asked here, so that nobody waits for a missing one
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib; install it with `pip install 'quire[bench]'`."
        ) from error


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write what was measured; the suffix chooses the format.

    Raises: ConfigError where nothing was measured, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["us"] is not None]
    read = [row for row in rows if row["kind"] == "decode"]
    computed = [row for row in rows if row["kind"] != "decode"]
    parts = [part for part in ("read", "computed") if (read if part == "read" else computed)]
    if not parts:
        raise ConfigError(f"--plot {path}: no backend could be measured, and nothing is drawn.")
    figure = Figure(figsize=(7 * len(parts), 5), layout="constrained")
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for place, part in zip(axes, parts, strict=True):
        if part == "read":
            _draw_read(place, read, report["ceilings"]["copy_tb_per_s"])
        else:
            _draw_computed(place, computed, report["ceilings"]["product_tflop_per_s"])
        place.grid(visible=True, alpha=0.3)
        place.legend(fontsize="small")
    spec = report["spec"]
    figure.suptitle(
        f"{spec['num_heads']}/{spec['num_kv_heads']} heads of {spec['head_dim']}, {spec['dtype']}, "
        f"{report['machine']['device']}"
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}.") from error


def lines_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return (context length, TB/s) in order, by backend and batch."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: (row["backend"], row["num_seqs"], row["longest"])):
        name = f"{row['backend']}, batch {row['num_seqs']}"
        lines.setdefault(name, []).append((row["longest"], row["tb_per_s"]))
    return lines


def _draw_read(axes: Any, rows: Sequence[Mapping[str, Any]], ceiling: float) -> None:
    for name, points in lines_of(rows).items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(ceiling, linestyle="--", color="black", label="copy, measured")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of context", ylabel="TB/s of keys and values", ylim=(0, None))


def _draw_computed(axes: Any, rows: Sequence[Mapping[str, Any]], ceiling: float) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["backend"] for row in rows))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        own = [row for row in rows if row["backend"] == name]
        places = [shapes.index(row["shape"]) + width * (number + 0.5) - 0.4 for row in own]
        axes.bar(places, [row["tflop_per_s"] for row in own], width, label=name)
    axes.axhline(ceiling, linestyle="--", color="black", label="product, measured")
    axes.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right")
    axes.set(ylabel="TFLOP/s")
