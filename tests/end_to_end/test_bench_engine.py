"""`quire bench offline|latency|prefill`: on the demo model, and on a folder with a config alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_llama

from quire.cli.main import main

SMALL = ["--num-threads", "1", "--kv-cache-memory-bytes", "64M", "--repeats", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without weights and tokenizer."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(tiny_llama.CONFIG))
    return folder


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run a benchmark and return its report."""
    code = main(["bench", *arguments, *SMALL, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report: dict[str, Any] = json.loads(captured.out)
    return report


def median(report: dict[str, Any], name: str) -> float:
    """Return a figure."""
    found = report["figures"][name]
    assert found["low"] <= found["median"] <= found["high"]
    assert len(found["values"]) == 2
    return float(found["median"])


def test_offline_counts_tokens_and_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(
        capsys, "offline", str(folder), "--load-format", "dummy", "--num-requests", "6",
        "--input-len", "5:20", "--output-len", "8", "--max-num-seqs", "4",
    )  # fmt: skip

    assert median(found, "output_tokens") == 48
    assert median(found, "running_peak") == 4
    assert median(found, "steps") == 16
    assert median(found, "total_tokens_per_s") > median(found, "output_tokens_per_s") > 0
    assert found["settings"]["enable_prefix_caching"] is False
    assert found["workload"]["temperature"] == 0.6
    assert set(found["choices"]) == {"attention", "grammar", "model", "quantization", "sampler"}
    assert {"checks", "weights"} <= set(found["start_s"])


@pytest.mark.slow
def test_offline_with_a_seed_draws_the_same_lengths(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = [
        median(
            bench(
                capsys, "offline", str(folder), "--load-format", "dummy", "--num-requests", "3",
                "--input-len", "1:9", "--output-len", "1:50", "--seed", seed,
            ),
            "output_tokens",
        )
        for seed in ("1", "1", "2")
    ]  # fmt: skip

    assert counts[0] == counts[1] != counts[2]


def test_latency_is_the_slope_between_two_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(
        capsys, "latency", "demo", "--batch-size", "2", "--input-len", "16",
        "--output-len", "4:24", "--ceilings",
    )  # fmt: skip

    ms = median(found, "ms_per_token")
    assert 0 < ms < 1000
    assert median(found, "ttft_ms") > 0
    assert median(found, "output_tokens_per_s") > 0
    assert found["ceilings"]["copy_tb_per_s"] > 0
    share = median(found, "weights_gb_per_s") / 1e3 / found["ceilings"]["one_row_tb_per_s"]
    assert found["reached"]["share"] == pytest.approx(share)


def test_prefill_counts_flops_by_shapes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(
        capsys, "prefill", str(folder), "--load-format", "dummy", "--input-len", "200",
        "--max-num-batched-tokens", "64",
    )  # fmt: skip

    assert median(found, "steps") == 4
    # Two layers of q, k, v, o and three of the MLP; 4 heads of 8 dims; one row of logits.
    linear = 2 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    attention = 2 * 2 * 4 * (8 + 8) * (200 * 201 // 2)
    flops = 200 * linear + attention + 2 * 101 * 32
    assert median(found, "tflop") == pytest.approx(flops / 1e12)


def test_table_names_machine_choices_workload_and_figures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--load-format", "dummy", "--input-len", "20", "--ceilings", *SMALL]

    assert main(["bench", "prefill", str(folder), *arguments]) == 0

    out = capsys.readouterr().out
    for words in ("torch", "attention", "enable_prefix_caching False", "median", "copy_tb_per_s"):
        assert words in out
    assert "tflop_per_s reaches " in out


BAD = {
    "no model": (("offline",), "required: model"),
    "no weights": (("offline", "FOLDER"), "no weights"),
    "no requests": (("offline", "FOLDER", "--num-requests", "0"), "numbers from 1"),
    "typo": (("offline", "demo", "--num-request", "3"), "Did you mean '--num-requests'"),
    "abbreviation": (("latency", "demo", "--batch", "3"), "unknown option '--batch'"),
    "bad range": (("offline", "demo", "--input-len", "9:3"), "LOW:HIGH"),
    "no range": (("latency", "demo", "--output-len", "9"), "LOW below HIGH"),
    "too long": (("prefill", "demo"), "context is 2048"),
    "bad option": (("latency", "demo", "--block-size", "3"), "powers of two"),
    "unknown backend": (("latency", "demo", "--attention-backend", "sdpaa"), "sdpa"),
    "startup of nothing": (("startup", "FOLDER"), "no weights"),
    "unknown cache": (("startup", "demo", "--cache", "hot"), "invalid choice"),
    "profile to a file": (("latency", "demo", "--profile", __file__), "--profile"),
    "unknown benchmark": (("speed", "demo"), "invalid choice: 'speed'"),
}


@pytest.fixture(scope="module")
def refused(folder: Path) -> dict[str, dict[str, Any]]:
    """Run all bad commands in one process without torch."""
    commands = [
        ["bench", *(str(folder) if word == "FOLDER" else word for word in arguments)]
        for arguments, _ in BAD.values()
    ]
    script = Path(__file__).with_name("run_commands.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(commands), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(BAD, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_torch_is_imported(
    refused: dict[str, dict[str, Any]], name: str
) -> None:
    found = refused[name]

    assert found["code"] == 2
    assert BAD[name][1] in found["err"]
    assert len(found["err"].strip().splitlines()) == 1
    assert not found["torch"]


@pytest.mark.parametrize("what", ["offline", "latency", "prefill"])
def test_profile_writes_a_trace_and_says_where_a_step_went(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    lengths = ["--input-len", "16"] + (["--output-len", "8:40"] if what != "prefill" else [])
    profile = ["--profile", str(tmp_path / "made"), "--profile-steps", "3", "--ceilings"]

    found = bench(capsys, what, str(folder), "--load-format", "dummy", *lengths, *profile)

    told = found["profile"]
    assert told["steps"] == (1 if what == "prefill" else 3)
    assert Path(told["trace"]).stat().st_size > 1000
    assert 0 < told["busy_us"] <= told["step_us"]
    told_us = sum(row["us_a_step"] for row in told["rows"]) + told["others_us"]
    assert 0.99 < told_us / told["busy_us"] < 1.01
    (product,) = [row for row in told["rows"] if row["name"] in ("aten::mm", "aten::addmm")][:1]
    assert product["tflop_per_s"] > 0
    assert product["of_ceiling"] > 0


@pytest.mark.slow
def test_startup_times_every_part_of_a_cold_and_a_warm_start(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--load-format", "dummy", "--num-threads", "1", "--repeats", "1", "--json"]

    assert main(["bench", "startup", str(folder), *arguments]) == 0

    figures = json.loads(capfd.readouterr().out)["figures"]
    for cache in ("cold", "warm"):
        parts = {k.partition(": ")[2]: v["median"] for k, v in figures.items() if cache in k}
        assert {"imports", "checks", "build", "weights", "kv cache", "first token"} <= set(parts)
        whole = parts.pop("whole")
        assert sum(parts.values()) == pytest.approx(whole)
        assert 0 <= parts["between"] < 0.5 * whole


def test_startup_that_fails_in_the_process_is_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--load-format", "dummy", "--cache", "cold"]
    cannot = ["--attention-option", "sdpa.nothing=1"]

    assert main(["bench", "startup", str(folder), *arguments, *cannot]) == 2

    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("quire: error: the engine did not start: ")


def test_traceback_is_shown_for_a_benchmark_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", "demo", "--output-len", "9", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
