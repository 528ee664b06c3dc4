"""`quire bench quality` on the demo model: tables, JSON, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from quire.cli.main import main

ROOT = Path(__file__).parents[2]
SMALL = ["--num-threads", "1", "--kv-cache-memory-bytes", "64M"]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first dialogues of the validation split."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    with (ROOT / "tests/data/coffee_orders_valid.jsonl").open() as lines:
        path.write_text("".join(itertools.islice(lines, 6)))
    return path


def test_int8_is_within_one_percent_of_the_model_in_its_own_dtype(
    chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["bench", "quality", "demo", "--quantization", "int8", "--json",
                 "--chat", str(chat), *SMALL])  # fmt: skip

    captured = capsys.readouterr()
    assert code == 0, captured.err
    report = json.loads(captured.out)
    plain, own = report["rows"]
    assert (plain["quantization"], own["quantization"]) == ("none", "int8")
    assert plain["tokens"] == own["tokens"] > 1000
    assert 1 < own["perplexity"] < plain["perplexity"] * 1.01
    assert own["agreement"] > 0.97
    assert 0 < own["kl_divergence"] < 0.01
    assert report["workload"]["file"] == str(chat)


@pytest.mark.parametrize(
    ("name", "stored"), [("fp8", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")]
)
def test_fp8_cache_is_within_one_percent_of_the_model_with_its_own(
    chat: Path, capsys: pytest.CaptureFixture[str], name: str, stored: str
) -> None:
    code = main(["bench", "quality", "demo", "--kv-cache-dtype", name, "--json",
                 "--chat", str(chat), *SMALL])  # fmt: skip

    captured = capsys.readouterr()
    assert code == 0, captured.err
    plain, own = json.loads(captured.out)["rows"]
    assert (plain["kv_cache"], own["kv_cache"]) == ("bfloat16", stored)
    assert abs(own["perplexity"] / plain["perplexity"] - 1) < 0.01
    assert own["agreement"] > 0.97
    assert 0 < own["kl_divergence"] < 0.01


def test_text_without_a_baseline_has_a_row_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("I would like a large latte with oat milk, please. " * 5)

    assert main(["bench", "quality", "demo", "--text", str(path), "--window", "16", *SMALL]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:4] == ["quantization", "kv", "cache", "tokens"]
    assert lines[-1].split()[0] == "none"
    assert lines[-1].split()[-2:] == ["-", "-"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--text", "no-such-file"], "--text no-such-file cannot be read"),
        (["demo", "--window", "1"], "--window"),
        (["demo", "--text", "a", "--chat", "b"], "not allowed with"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["bench", "quality", *arguments])
    except SystemExit as error:
        code = int(error.code or 0)

    assert code == 2
    assert words in capsys.readouterr().err
