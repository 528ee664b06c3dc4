"""A tiny Llama with a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

import tiny_llama

SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


def write_model(folder: Path, **keys: object) -> Path:
    """Write a model whose sizes make whole groups of 32, and what belongs to it."""
    folder.mkdir()
    tiny_llama.write_folder(folder, **{**SIZES, **keys})
    tiny_llama.write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "LICENSE").write_text("do as you like")
    return folder
