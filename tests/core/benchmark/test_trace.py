"""A trace becomes a table: time by kernel or operator, gaps, and FLOPs where shapes tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.benchmark.trace import on_device, on_host, product_of, read


def event(name: str, ts: float, dur: float, cat: str = "kernel", **args: Any) -> dict[str, Any]:
    """Return a complete event; `id` is the number that links kernels and operators."""
    if "id" in args:
        args["External id"] = args.pop("id")
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def operator(name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return event(name, ts, dur, "cpu_op", **args)


MM: dict[str, Any] = {
    "Input Dims": [[4, 8], [8, 16]],
    "Input type": ["c10::BFloat16", "c10::BFloat16"],
}


def test_kernels_are_added_up_by_name_most_first() -> None:
    found = on_device([event("a", 0, 2), event("b", 2, 5), event("a", 7, 1)])

    assert [(s.name, s.calls, s.us) for s in found.spent] == [("b", 1, 5), ("a", 2, 3)]


def test_busy_time_counts_what_overlaps_once_and_gaps_are_the_rest() -> None:
    found = on_device([event("a", 0, 4), event("b", 2, 4), event("c", 10, 1), event("d", 3, 1)])

    assert (found.busy_us, found.span_us) == (7, 11)


def test_operators_of_the_host_are_no_kernels() -> None:
    assert on_device([operator("aten::mm", 0, 4)]).spent == []
    assert on_device([]).span_us == 0


def test_kernel_of_a_product_has_its_flops_and_bytes() -> None:
    (found,) = on_device([operator("aten::mm", 0, 1, id=7, **MM), event("gemm", 5, 2, id=7)]).spent

    assert found.flops == 2 * 4 * 8 * 16
    assert found.num_bytes == 2 * (4 * 8 + 8 * 16 + 4 * 16)


def test_only_the_longest_kernel_of_an_operator_has_its_flops() -> None:
    found = on_device(
        [
            operator("aten::mm", 0, 1, id=7, **MM),
            event("split", 5, 9, id=7),
            event("reduce", 15, 1, id=7),
        ]
    )

    assert [(s.name, s.flops is None) for s in found.spent] == [("split", False), ("reduce", True)]


def test_kernel_without_an_operator_of_known_shape_has_no_flops() -> None:
    found = on_device(
        [
            operator("aten::mm", 0, 1, id=7, **MM),
            event("gemm", 5, 2, id=7),
            event("gemm", 8, 2),  # from a graph
        ]
    )

    assert [(s.calls, s.flops) for s in found.spent] == [(2, None)]


def test_operator_is_counted_without_those_inside_it() -> None:
    found = on_host(
        [
            operator("outer", 0, 10),
            operator("inner", 0, 4),
            operator("inmost", 1, 1),
            operator("inner", 5, 2),
            operator("outer", 12, 1),
        ]
    )

    assert {s.name: s.us for s in found.spent} == {"outer": 5, "inner": 5, "inmost": 1}
    assert (found.busy_us, found.span_us) == (11, 13)


@pytest.mark.parametrize(
    ("name", "shapes", "flops"),
    [
        ("aten::mm", [[4, 8], [8, 16]], 2 * 4 * 8 * 16),
        ("aten::addmm", [[16], [4, 8], [8, 16]], 2 * 4 * 8 * 16),
        ("aten::bmm", [[3, 4, 8], [3, 8, 16]], 2 * 3 * 4 * 8 * 16),
        ("mkldnn::_linear_pointwise", [[4, 8], [16, 8]], 2 * 4 * 8 * 16),
        ("aten::add", [[4, 8], [4, 8]], None),
        ("aten::mm", [], None),
    ],
)
def test_products_are_known_by_their_shapes(
    name: str, shapes: list[list[int]], flops: int | None
) -> None:
    args = {"Input Dims": shapes, "Input type": ["float"] * len(shapes)}

    found = product_of(operator(name, 0, 1, **args))

    assert (found.flops if found else None) == flops


def test_read_keeps_complete_events(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "x"}, event("a", 0, 1)]}))

    assert [e["name"] for e in read(path)] == ["a"]
