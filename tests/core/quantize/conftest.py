"""A tiny Llama with a tokenizer of bytes, and texts to calibrate it with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from small_model import write_model  # noqa: E402 - needs the lines above


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calibration") / "dialogues.jsonl"
    words = "one small step for a man, one giant leap for mankind; " * 4
    lines = [{"messages": [{"role": "user", "content": words[i : i + 90]}]} for i in range(9)]
    lines += [{"text": words[i : i + 40]} for i in range(4)]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file
