"""The benchmark of attention judges what it times, and a backend that fails has a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from broken_backends import BROKEN
from gather_attention import GatherAttention
from torch import Tensor

from quire.benchmark import attention_bench, attention_inputs, attention_truth, timing
from quire.benchmark.attention_bench import Contender, has_failed
from quire.benchmark.attention_chart import draw, lines_of
from quire.benchmark.attention_inputs import Inputs, Workload
from quire.benchmark.attention_report import as_text
from quire.benchmark.attention_shapes import Shape
from quire.benchmark.attention_truth import Truth
from quire.errors import ConfigError
from quire.testing.attention_cases import make_spec
from quire_attention.reference.backend import ReferenceAttention
from quire_attention.sdpa.backend import SdpaAttention

SPEC = make_spec()
SHAPES = [Shape.parse(text) for text in ("decode:2x9", "prefill:12", "mixed:2x7+3@9")]
BROKEN_SCALE = BROKEN["scale-squared"]


class Raises(GatherAttention):
    def attend(self, *arguments: Any) -> None:
        raise RuntimeError("no kernel\nfor this")


class GivesNan(GatherAttention):
    def attend(self, layer: Any, q: Tensor, *rest: Any) -> None:
        super().attend(layer, q, *rest)
        rest[4][0, 0, 0] = float("nan")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go round little, and measure for a moment."""
    monkeypatch.setattr(timing, "MOST_ROTATED", 1 << 16)
    monkeypatch.setattr(timing, "CPU_TIME", 0.005)
    ceilings = {"copy_tb_per_s": 0.01, "one_row_tb_per_s": 0.01, "product_tflop_per_s": 0.1}
    monkeypatch.setattr(attention_bench, "measure_ceilings", lambda *_: dict(ceilings))


def report_of(*contenders: Contender, shapes: list[Shape] = SHAPES) -> dict[str, Any]:
    return attention_bench.run(contenders, shapes, SPEC, 0)


def contender(name: str, backend: type | None = GatherAttention, **values: Any) -> Contender:
    return Contender(name=name, backend=backend, **values)


@pytest.mark.parametrize("at_once", [3, 8, 8192])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("text", ["decode:3x9", "prefill:2x12", "mixed:2x7+3@9+5@5"])
@pytest.mark.parametrize("backend", [GatherAttention, ReferenceAttention, SdpaAttention])
def test_workload_is_right_however_its_cache_was_filled(
    monkeypatch: pytest.MonkeyPatch, backend: type, text: str, window: int | None, at_once: int
) -> None:
    monkeypatch.setattr(attention_inputs, "WRITTEN_AT_ONCE", at_once)
    inputs = Inputs.draw(Shape.parse(text), make_spec(sliding_window=window), 0)

    workload = Workload(backend, {}, inputs)
    truth = Truth(inputs)

    assert truth.judge(workload.attend()).of_bound <= 1
    assert workload.make_copies(3 * workload.copy_bytes) == 3
    assert torch.equal(workload.attend(1), workload.attend(0))
    assert workload.attend(1).data_ptr() != workload.attend(2).data_ptr()
    assert workload.attend(1).data_ptr() == workload.attend(4).data_ptr()


def test_copies_of_tiny_steps_are_not_endless() -> None:
    workload = Workload(GatherAttention, {}, Inputs.draw(SHAPES[0], SPEC, 0))

    assert workload.make_copies(1 << 40) == attention_inputs.MOST_COPIES


@pytest.mark.parametrize("window", [None, 5])
def test_truth_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    inputs = Inputs.draw(Shape.parse("mixed:20+13@30"), make_spec(sliding_window=window), 0)
    whole = Truth(inputs).exact

    monkeypatch.setitem(attention_truth.MOST_SCORES, "cpu", 300)

    assert torch.allclose(Truth(inputs).exact, whole, rtol=1e-12, atol=1e-12)


def test_truth_names_an_error_by_the_bound() -> None:
    inputs = Inputs.draw(SHAPES[1], SPEC, 0)
    truth = Truth(inputs)
    right = truth.exact.float()

    assert truth.judge(right).of_bound < 1
    assert truth.judge(right * (1 + 1e-4)).of_bound > 10
    nan = right.clone()
    nan[3, 2, 1] = float("nan")
    assert truth.judge(nan).of_bound == float("inf")


def test_every_backend_has_a_row_for_every_shape() -> None:
    report = report_of(contender("a"), contender("b", ReferenceAttention))

    assert [(row["shape"], row["backend"], row["verdict"]) for row in report["rows"]] == [
        (shape.text, name, "right") for shape in SHAPES for name in ("a", "b")
    ]
    for row in report["rows"]:
        assert 0 < row["us_low"] <= row["us"] <= row["us_high"]
        assert row["how"] == "calls"
        assert 0 <= row["error_of_bound"] <= 1
        assert row["plan_us"] > 0
    assert not has_failed(report)


def test_rates_are_what_is_read_and_computed_by_the_time() -> None:
    [row] = report_of(contender("a"), shapes=[Shape.parse("decode:2x9")])["rows"]

    # 18 keys and values of 2 KV heads of 16 float32; 18 pairs of 4 heads, two products of 16.
    assert row["kv_bytes"] == 18 * 2 * 32 * 4
    assert row["flops"] == 18 * 4 * 2 * 32
    assert row["tb_per_s"] == pytest.approx(row["kv_bytes"] / row["us"] / 1e6)
    assert row["tflop_per_s"] == pytest.approx(row["flops"] / row["us"] / 1e6)
    shares = {"copy": row["tb_per_s"] / 0.01, "product": row["tflop_per_s"] / 0.1}
    assert row["of_ceiling"] == pytest.approx(max(shares.values()))
    assert row["bound_by"] == "copy"


@pytest.mark.parametrize(
    ("backend", "verdict", "error"),
    [(BROKEN_SCALE, "WRONG", float), (GivesNan, "WRONG", type(None))],
)
def test_wrong_backend_is_timed_and_called_wrong(backend: type, verdict: str, error: type) -> None:
    report = report_of(contender("right"), contender("wrong", backend), shapes=SHAPES[:1])

    right, wrong = report["rows"]
    assert (right["verdict"], wrong["verdict"]) == ("right", verdict)
    assert isinstance(wrong["error_of_bound"], error)
    assert wrong["us"] > 0
    assert has_failed(report)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_backend_that_raises_has_a_row_and_the_others_go_on() -> None:
    report = report_of(contender("bad", Raises), contender("good"), shapes=SHAPES[:1])

    bad, good = report["rows"]
    assert (bad["verdict"], bad["why"]) == ("failed", "RuntimeError: no kernel for this")
    assert good["verdict"] == "right"
    assert has_failed(report)


class Exits(GatherAttention):
    def attend(self, *arguments: Any) -> None:
        raise SystemExit(3)


class MakesItSmall(GatherAttention):
    def attend(self, layer: Any, q: Tensor, *rest: Any) -> None:
        rest[4].resize_(3)


class HasNoLayout(GatherAttention):
    @classmethod
    def kv_layout(cls, spec: Any) -> Any:
        return None


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        (Exits, "SystemExit: 3"),
        (MakesItSmall, "KernelError: MakesItSmall made `out` [3], given as [2, 4, 16]"),
        (HasNoLayout, "PluginError: attention backend 'HasNoLayout' returns None from kv_layout()"),
    ],
)
def test_backend_that_breaks_its_contract_has_a_row(backend: type, why: str) -> None:
    [row] = report_of(contender("bad", backend), shapes=SHAPES[:1])["rows"]

    assert row["verdict"] == "failed"
    assert row["why"].startswith(why)


def test_backend_that_is_not_usable_has_one_row_with_the_reason() -> None:
    report = report_of(contender("no", None, reason="it is not built."), contender("yes"))

    first, *others = report["rows"]
    assert (first["backend"], first["verdict"], first["why"]) == (
        *("no", "not usable"),
        "it is not built.",
    )
    assert {row["backend"] for row in others} == {"yes"}
    assert not has_failed(report)
    assert has_failed(report_of(contender("no", None, reason="it is not built.")))


def test_inputs_that_do_not_fit_are_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_bench, "host_memory_left", lambda: 1000)

    [row] = report_of(contender("a"), shapes=SHAPES[:1])["rows"]

    assert row["verdict"] == "failed"
    assert row["why"].startswith("the inputs do not fit: MemoryError: ")


def test_options_reach_the_backend() -> None:
    seen: list[Mapping[str, Any]] = []

    class Watching(GatherAttention):
        def __init__(self, spec: Any, limits: Any, options: Mapping[str, Any]) -> None:
            super().__init__(spec, limits, options)
            seen.append(options)

    report_of(contender("a", Watching, options={"tile": 7}), shapes=SHAPES[:1])

    assert seen == [{"tile": 7}]


def test_calls_go_round_and_those_before_do_not_count() -> None:
    turns: list[int] = []

    times = timing.measure(turns.append, 3, torch.device("cpu"))

    assert turns == list(range(len(turns)))
    assert len(turns) > timing.LEAST_CALLS
    assert times.low <= times.median <= times.high


def test_table_has_a_line_a_row_and_says_why_not() -> None:
    report = report_of(contender("no", None, reason="it is not built."), contender("yes"))

    head, *lines = as_text(report).splitlines()[5:]

    assert head.split()[:5] == ["shape", "backend", "us", "low", "high"]
    assert lines[0].split(None, 2) == ["-", "no", "not usable: it is not built."]
    assert [line.split()[:2] for line in lines[1:]] == [[shape.text, "yes"] for shape in SHAPES]
    assert all(line.split()[-2:] == ["calls", "right"] for line in lines[1:])


def test_lines_of_the_picture_are_backends_and_batches_by_context() -> None:
    rows = [
        {"backend": name, "num_seqs": batch, "longest": longest, "tb_per_s": float(longest)}
        for longest in (64, 16)
        for batch in (2, 1)
        for name in ("b", "a")
    ]

    lines = lines_of(rows)

    assert list(lines) == ["a, batch 1", "a, batch 2", "b, batch 1", "b, batch 2"]
    assert lines["a, batch 1"] == [(16, 16.0), (64, 64.0)]


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1], SHAPES[1:]])
def test_picture_is_drawn(tmp_path: Path, suffix: str, start: bytes, shapes: list[Shape]) -> None:
    path = tmp_path / f"out.{suffix}"

    draw(report_of(contender("a"), contender("b"), shapes=shapes), path)

    assert path.read_bytes().startswith(start)


def test_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    report = report_of(contender("no", None, reason="it is not built."))

    with pytest.raises(ConfigError, match="no backend could be measured"):
        draw(report, tmp_path / "out.png")


def test_report_has_what_a_reader_needs_to_repeat_it() -> None:
    report = report_of(contender("a"), shapes=SHAPES[:1])

    assert report["spec"] == attrs.asdict(SPEC)
    assert {"device", "torch", "threads"} <= set(report["machine"])
    assert (report["seed"], report["rotated_bytes"]) == (0, 1 << 16)
    assert set(report["ceilings"]) >= {"copy_tb_per_s", "product_tflop_per_s"}
