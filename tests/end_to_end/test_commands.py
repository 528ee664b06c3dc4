"""The commands as real processes on the demo model: what they print and how they end."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

QUIRE = [sys.executable, "-m", "quire"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--num-threads", "1", "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "8"]


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run `quire` to its end."""
    return subprocess.run(
        [*QUIRE, *arguments],
        input=text,
        capture_output=True,
        text=True,
        env=ONE_THREAD,
        timeout=120,
    )


def test_generate_prints_the_completion_of_each_prompt(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('A latte\n{"prompt_token_ids": [300, 301]}\n')

    found = run(
        "generate", "demo", "-p", "-", "--prompts-file", str(prompts), "--json",
        "--max-tokens", "4", "--ignore-eos", "--temperature", "0", *SMALL, text="Hello",
    )  # fmt: skip

    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["Hello", "A latte", None]
    assert [len(line["outputs"][0]["token_ids"]) for line in lines] == [4, 4, 4]
    assert all(line["outputs"][0]["finish_reason"] == "length" for line in lines)


def test_chat_answers_every_line_and_tells_its_speed() -> None:
    found = run("chat", "demo", *SMALL, text="Hi, can I get a latte?\n/new\nhello\n/exit\n")

    assert found.returncode == 0, found.stderr
    assert len(found.stdout.strip()) > 10
    assert found.stderr.count("tokens/s") == 2
    assert "<|im_" not in found.stdout


def test_chat_goes_on_after_a_message_that_is_too_long() -> None:
    found = run("chat", "demo", *SMALL, text=f"{'coffee ' * 20_000}\nhello\n")

    assert found.returncode == 0, found.stderr
    assert "context" in found.stderr
    assert found.stderr.count("tokens/s") == 1


def test_explain_prints_settings_choices_and_memory() -> None:
    found = run("explain", "demo", "--json", "--block-size", "8", "--max-model-len", "auto")

    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    settings = {row["name"]: row for row in told["settings"]}
    assert (settings["block_size"]["value"], settings["block_size"]["set_by"]) == (8, "user")
    assert settings["dtype"]["set_by"] == "model"
    assert settings["max_num_seqs"]["set_by"] == "default"
    choices = {choice["kind"]: choice for choice in told["choices"]}
    assert choices["attention"]["requested"] == "auto"
    assert set(choices) == {"attention", "grammar", "model", "quantization", "sampler"}
    assert {"weights", "KV blocks", "activations", "graphs", "free"} <= set(told["memory"]["items"])


def test_output_to_a_full_disk_is_one_clear_error() -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [*QUIRE, "generate", "demo", "-p", "hi", "--max-tokens", "2", *SMALL],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=ONE_THREAD,
            timeout=120,
        )

    assert found.returncode == 1
    assert "No space left" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_an_interrupted_chat_keeps_what_there_is_and_goes_on() -> None:
    chat, primary = chat_in_a_terminal("--ignore-eos")
    try:
        shown = read_until(primary, b"> ")
        os.write(primary, b"Tell me everything\n")
        read_until(primary, b"everything")
        time.sleep(1.0)
        chat.send_signal(signal.SIGINT)
        shown = read_until(primary, b"> ")
        os.write(primary, b"/exit\n")
        assert chat.wait(timeout=30) == 0
    finally:
        chat.kill()
        os.close(primary)
    assert b"[stopped]" in shown


def test_a_chat_interrupted_while_it_waits_ends_with_130() -> None:
    chat, primary = chat_in_a_terminal()
    try:
        read_until(primary, b"> ")
        errors = interrupt(chat)
    finally:
        chat.kill()
        os.close(primary)
    assert chat.returncode == 130
    assert b"Traceback" not in errors


def interrupt(process: subprocess.Popen[bytes], timeout_s: float = 30.0) -> bytes:
    """Press Ctrl-C until a process ends; return what it wrote on standard error.

    Between showing its prompt and waiting for a line, Python takes a signal in and goes on to wait.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=4)[1]
        except subprocess.TimeoutExpired:
            assert time.monotonic() < deadline


def chat_in_a_terminal(*options: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start `quire chat demo` in a terminal and return it with the terminal's other end."""
    primary, secondary = pty.openpty()
    chat = subprocess.Popen(
        [*QUIRE, "chat", "demo", *options, *SMALL],
        stdin=secondary,
        stdout=secondary,
        stderr=subprocess.PIPE,
        env=ONE_THREAD,
        start_new_session=True,
        # A shell without job control starts what runs in its background deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(secondary)
    return chat, primary


def read_until(terminal: int, wanted: bytes, timeout_s: float = 60.0) -> bytes:
    """Read from a terminal until it showed something."""
    shown, deadline = b"", time.monotonic() + timeout_s
    while wanted not in shown:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], shown
        try:
            shown += os.read(terminal, 4096)
        except OSError:
            pytest.fail(f"the terminal closed after {shown!r}")
    return shown
