"""What a benchmark of an engine tells: machine, choices, workload, figures; as a table or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.phases import Phases

MAX_NAME = 80  # of a kernel, in a table
# Figure of a benchmark, the ceiling that bounds it, and what both are divided by to compare.
BOUNDS = {
    "offline": ("tflop_per_s", "product_tflop_per_s", 1.0),
    "latency": ("weights_gb_per_s", "one_row_tb_per_s", 1e3),
    "prefill": ("tflop_per_s", "product_tflop_per_s", 1.0),
}


def reached(what: str, figures: Mapping[str, Any], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Return the share of the ceiling that bounds a benchmark."""
    figure, ceiling, per_unit = BOUNDS[what]
    share = figures[figure]["median"] / per_unit / ceilings[ceiling]
    return {"figure": figure, "of": ceiling, "share": share}


def add_shares(rows: Sequence[dict[str, Any]], ceilings: Mapping[str, float]) -> None:
    """Give each row of a profile the share of the nearer ceiling, where its shapes are known."""
    for row in rows:
        if row["tflop_per_s"] is not None:
            row["of_ceiling"] = max(
                row["tflop_per_s"] / ceilings["product_tflop_per_s"],
                row["gb_per_s"] / 1e3 / ceilings["copy_tb_per_s"],
            )


def as_text(report: Mapping[str, Any]) -> str:
    """Return a report as lines for people."""
    lines = [f"{report['benchmark']}: {report['model']}"]
    lines += [_listed("machine", report["machine"])]
    for name in ("choices", "settings", "workload"):
        lines += [_listed(name, report[name])]
    if report.get("start_s"):
        lines += [f"start      {Phases(report['start_s'])}"]
    lines += ["", *_figure_lines(report["figures"])]
    if report.get("ceilings"):
        lines += ["", *(f"{name:<24}{value:>14,.3f}" for name, value in report["ceilings"].items())]
    if report.get("reached"):
        found = report["reached"]
        lines += [f"{found['figure']} reaches {found['share']:.0%} of {found['of']}"]
    if report.get("profile"):
        lines += ["", *_profile_lines(report["profile"])]
    return "\n".join(lines)


def _listed(name: str, values: Mapping[str, Any]) -> str:
    return f"{name:<11}" + ", ".join(f"{key} {value}" for key, value in values.items())


def _figure_lines(figures: Mapping[str, Any]) -> list[str]:
    lines = [f"{'':<24}" + "".join(f"{name:>14}" for name in ("median", "low", "high"))]
    for name, found in figures.items():
        numbers = (found[key] for key in ("median", "low", "high"))
        lines.append(f"{name:<24}" + "".join(f"{number:>14,.3f}" for number in numbers))
    return lines


def _profile_lines(profile: Mapping[str, Any]) -> list[str]:
    steps = profile["steps"]
    lines = [
        f"{steps} steps of {profile['step_us']:.0f} us; busy {profile['busy_us']:.0f} us, "
        f"gaps {profile['gap_us']:.0f} us a step; trace in {profile['trace']}",
        f"{'us a step':>10}{'share':>8}{'calls':>8}{'us a call':>11}{'MB':>9}{'MFLOP':>10}"
        f"{'TFLOP/s':>9}{'GB/s':>8}{'ceiling':>9}  name",
    ]
    lines += [_profile_line(row) for row in profile["rows"]]
    lines.append(f"  {profile['others_us']:8.1f}  by all others")
    return lines


def _profile_line(row: Mapping[str, Any]) -> str:
    names = ("mb_a_call", "mflop_a_call", "tflop_per_s", "gb_per_s")
    cost, work, flops, read = (f"{row[n]:.1f}" if row[n] is not None else "" for n in names)
    share = f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else ""
    return (
        f"{row['us_a_step']:>10.1f}{row['share']:>8.1%}{row['calls_a_step']:>8.1f}"
        f"{row['us_a_call']:>11.1f}{cost:>9}{work:>10}{flops:>9}{read:>8}{share:>9}"
        f"  {row['name'][:MAX_NAME]}"
    )
