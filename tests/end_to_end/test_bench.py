"""`quire bench serve` against a real server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import QUIRE, Server, serving

TRACES = Path(__file__).parents[1] / "data/traces"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def bench(server: Server, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(QUIRE), "bench", "serve", "--base-url", server.url, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def figures(server: Server, *options: str) -> dict[str, Any]:
    done = bench(server, *options, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_closed_loop_counts_every_token_and_draws(server: Server, tmp_path: Path) -> None:
    plot = tmp_path / "latencies.png"
    options = ("--num-requests", "12", "--concurrency", "4", "--output-len", "8", "--ignore-eos")

    found = figures(server, *options, "--plot", str(plot), "--goodput", "e2e:60000")

    assert (found["answered"], found["output_tokens"]) == (12, 96)
    assert found["prompt_tokens"] == 12 * 128
    assert found["goodput_share"] == 1.0
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"] <= found["e2e_ms"]["p99"]
    assert plot.stat().st_size > 1000


def test_open_loop_keeps_the_rate(server: Server) -> None:
    found = figures(server, "--num-requests", "30", "--rate", "20", "--output-len", "2")

    assert found["answered"] == 30
    assert 0.5 < found["duration_s"] < 10


@pytest.mark.parametrize(
    ("name", "scale"), [("azure_conv_2023.csv", "0.05"), ("mooncake_conversation.jsonl", "0.03125")]
)
def test_trace_is_replayed(server: Server, name: str, scale: str) -> None:
    options = ("--trace", str(TRACES / name), "--length-scale", scale, "--num-requests", "40")

    found = figures(server, *options, "--trace-speed", "40")

    assert found["answered"] == 40
    if name.startswith("mooncake"):  # its prompts share blocks, of 16 tokens at this scale
        assert found["cached_tokens"] > 0


def test_chat_is_measured_as_words(server: Server) -> None:
    found = figures(server, "--endpoint", "chat", "--num-requests", "4", "--output-len", "4")

    assert found["answered"] == 4


def test_failed_requests_are_counted_and_named(server: Server) -> None:
    done = bench(server, "--num-requests", "3", "--input-len", "4000", "--max-len", "9000")

    assert done.returncode == 1
    assert "400: " in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "nope"),
        ("--goodput", "x:1"),
        ("--token-ids", "5"),
        ("--extra-body", "[]"),
        ("--trace", "/nowhere.jsonl"),
        ("--rate", "0"),
        ("--concurrency", "0"),
        ("--base-url", "http://127.0.0.1:1"),
    ],
    ids=" ".join,
)
def test_bad_option_is_one_line(server: Server, options: tuple[str, ...]) -> None:
    done = bench(server, *options)

    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
