"""The report of `quire bench attention` as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_text(report: Mapping[str, Any]) -> str:
    """Return the lines of a report."""
    spec, ceilings = report["spec"], report["ceilings"]
    window = "" if spec["sliding_window"] is None else f", window {spec['sliding_window']}"
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    rows = [_line(row) for row in report["rows"]]
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
    return "\n".join(
        [
            f"attention: {spec['num_heads']}/{spec['num_kv_heads']} heads of {spec['head_dim']}, "
            f"{spec['dtype']}, blocks of {spec['block_size']}{window}",
            f"machine    {machine}",
            f"ceilings   copy {ceilings['copy_tb_per_s']:.3f} TB/s, "
            f"product {ceilings['product_tflop_per_s']:.3f} TFLOP/s",
            f"inputs     seed {report['seed']}, copies of {report['rotated_bytes'] >> 20} MiB",
            "",
            *(_aligned(line, widths) for line in (_HEAD, *rows)),
        ]
    )


_HEAD = (
    *("shape", "backend", "us", "low", "high", "plan us", "TB/s", "TFLOP/s", "ceiling"),
    *("error/bound", "timed as", "verdict"),
)


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    shape = row["shape"] or "-"
    if row["us"] is None:
        return (shape, row["backend"], *([""] * 9), f"{row['verdict']}: {row['why']}")
    error = row["error_of_bound"]
    return (
        shape,
        row["backend"],
        *(f"{row[key]:.1f}" for key in ("us", "us_low", "us_high", "plan_us")),
        f"{row['tb_per_s']:.3g}",
        f"{row['tflop_per_s']:.3g}",
        f"{row['of_ceiling']:.0%} {row['bound_by']}",
        "NaN" if error is None else f"{error:.2f}",
        row["how"],
        row["verdict"],
    )


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    """Return a line whose first two and last columns begin, and whose others end, together."""
    cells = [
        text if i == len(line) - 1 else text.ljust(width) if i < 2 else text.rjust(width)
        for i, (text, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
