"""Bad options, folders and files end with code 2 and one line that names what is wrong.

The commands share one process, which never imports torch; a few are real ones, and timed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bad_models
import pytest
import tiny_llama
from bad_models import EARLY, LATE, Case

from quire.cli.main import main

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return tiny_llama.write_tokenizer(tiny_llama.write_folder(folder, vocab_size=256))


def arguments_of(case: Case, good: Path, folder: Path) -> list[str]:
    shutil.copytree(good, folder)
    case.damage(folder)
    return ["generate", str(folder), *case.prompt, *case.options]


@pytest.fixture(scope="module")
def results(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("bad")
    commands = [arguments_of(case, good, root / str(i)) for i, case in enumerate(EARLY.values())]
    script = Path(__file__).with_name("run_commands.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(EARLY, json.loads(done.stdout), strict=True))


def check(case: Case, code: int, err: str) -> None:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err[:2000]
    assert lines[0].startswith("quire: error: ")
    assert code == 2, err
    # All architectures that somebody builds are named.
    assert len(lines[0]) < 2000
    for word in case.words:
        assert word in lines[0]


@pytest.mark.parametrize("name", EARLY)
def test_bad_input_is_refused_in_one_line_before_torch_is_imported(
    results: Results, name: str
) -> None:
    case, found = EARLY[name], results[name]

    check(case, found["code"], found["err"])
    assert found["out"] == ""
    assert not found["torch"]
    assert found["seconds"] < case.seconds


@pytest.mark.parametrize("name", LATE)
def test_bad_choice_or_contradiction_is_refused_in_one_line(
    good: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = LATE[name]
    arguments = arguments_of(case, good, tmp_path / "model")

    code = main([*arguments, "--num-threads", "1"])

    check(case, code, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["unknown architecture", "garbage header", "bad dtype"])
def test_real_process_ends_within_two_seconds(good: Path, tmp_path: Path, name: str) -> None:
    case = EARLY[name]
    arguments = arguments_of(case, good, tmp_path / "model")
    begin = time.monotonic()

    done = subprocess.run(
        [sys.executable, "-m", "quire", *arguments], capture_output=True, text=True, env=ENVIRONMENT
    )

    assert time.monotonic() - begin < 2.0
    check(case, done.returncode, done.stderr)


@pytest.mark.parametrize("model", ["/no/such/folder", "no-such-name", "no-owner/no-name"])
def test_model_that_is_nowhere_is_refused_in_one_line(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    code = main(["generate", model, "-p", "hi"])

    check(Case((model, "no such folder")), code, capsys.readouterr().err)


@pytest.mark.parametrize("command", ["generate", "chat", "explain"])
def test_every_command_refuses_a_damaged_model_alike(
    good: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = EARLY["no layers"]
    folder = arguments_of(case, good, tmp_path / "model")[1]
    prompt = ["-p", "hi"] if command == "generate" else []

    code = main([command, folder, *prompt])

    check(case, code, capsys.readouterr().err)


def test_nothing_that_a_checkpoint_carries_was_run(results: Results) -> None:
    assert results["remote code"]["code"] == results["pickled weights"]["code"] == 2
    assert not bad_models.SENTINEL.exists()


def test_good_folder_is_served(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["generate", str(good), "-p", "hi", "--max-tokens", "2", "--num-threads", "1"])

    assert code == 0
    assert capsys.readouterr().err == ""
