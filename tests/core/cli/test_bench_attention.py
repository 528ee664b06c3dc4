"""`quire bench attention` from the command line, on small shapes and a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from quire.cli.main import main

SMALL = [
    *("--device", "cpu", "--num-threads", "1", "--heads", "4/2", "--head-dim", "16"),
    *("--shapes", "decode:2x9,prefill:12", "--dtype", "float32"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.benchmark import machine, timing

    monkeypatch.setattr(timing, "MOST_ROTATED", 1 << 16)
    monkeypatch.setattr(timing, "CPU_TIME", 0.005)
    monkeypatch.setattr(machine, "ROUNDS", 2)


def bench(*arguments: str) -> int:
    return main(["bench", "attention", *SMALL, *arguments])


def test_all_backends_are_measured_or_say_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--json") == 0

    report = json.loads(capsys.readouterr().out)
    verdicts = {row["backend"]: row["verdict"] for row in report["rows"]}
    assert verdicts["reference"] == verdicts["sdpa"] == "right"
    assert verdicts["triton"] in ("right", "not usable")
    assert report["spec"]["dtype"] == report["spec"]["kv_dtype"] == "float32"
    assert (report["spec"]["num_heads"], report["spec"]["num_kv_heads"]) == (4, 2)


def test_named_backends_are_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--backends", "sdpa, reference", "--window", "5", "--block-size", "4") == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "attention: 4/2 heads of 16, float32, blocks of 4, window 5"
    assert [line.split()[:2] for line in lines[6:]] == [
        [shape, name] for shape in ("decode:2x9", "prefill:12") for name in ("sdpa", "reference")
    ]


def test_quantized_cache_is_judged_by_what_it_stores_and_counts_its_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reports = []
    for name in ("auto", "fp8"):
        assert bench("--backends", "sdpa,reference", "--kv-cache-dtype", name, "--json") == 0
        reports.append(json.loads(capsys.readouterr().out))

    wide, narrow = reports
    assert narrow["spec"]["kv_dtype"] == "float8_e4m3fn"
    assert {row["verdict"] for row in narrow["rows"]} == {"right"}
    pairs = zip(wide["rows"], narrow["rows"], strict=True)
    assert all(row["kv_bytes"] == 4 * own["kv_bytes"] for row, own in pairs)


def test_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "attention.svg"

    assert bench("--backends", "sdpa", "--plot", str(path)) == 0

    assert "<svg" in path.read_text()


def test_nothing_usable_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--backends", "sdpa", "--heads", "4/2", "--disable-plugin", "attention-sdpa") == 2

    assert "unknown attention backend 'sdpa'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--shapes", "decode:x"], "'decode:x' is no shape; allowed: decode:BxL"),
        (["--heads", "3/2"], "'3/2' is not allowed; write HEADS/KV_HEADS"),
        (["--heads", "many"], "'many' is not allowed; write HEADS/KV_HEADS"),
        (["--backends", "sdp"], "unknown attention backend 'sdp'; installed: "),
        (["--backends", "sdpa,sdpa"], "--backends sdpa,sdpa names one twice; name each once."),
        (["--block-size", "3"], "--block-size is 3; allowed: powers of two from 1 to 4096."),
        (["--dtype", "float8"], "--dtype is 'float8'; allowed: auto, float32"),
        (["--plot", "a.txt"], "--plot a.txt: write a name that ends in .png or .svg."),
        (["--plot", "/no/such/a.png"], "there is no folder /no/such; make it first."),
        (["--attention-option", "sdpa.x=1"], "'sdpa' has no option 'x'. It has: none."),
        (["--backends", "sdpa", "--attention-option", "reference.x=1"], "in use is 'sdpa'."),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], fact: str
) -> None:
    assert bench(*arguments) == 2

    error = capsys.readouterr().err
    assert fact in error
    assert error.count("\n") == 1


def test_picture_without_matplotlib_is_refused_before_anything_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert bench("--plot", "a.png") == 2

    assert capsys.readouterr().err == (
        "quire: error: --plot needs matplotlib; install it with `pip install 'quire[bench]'`.\n"
    )
