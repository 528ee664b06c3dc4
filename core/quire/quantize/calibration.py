"""What a model is calibrated on: token ids of a text, or of the lines of a JSONL file. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from quire.frontend import Frontend

DEFAULT_FILE = "calibration.jsonl"
JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")


def calibration_file(frontend: Frontend, given: Path | None) -> Path:
    """Return the file that was given, or the checkpoint's own. Raises: ConfigError."""
    if given is not None:
        return given
    own = frontend.prepared.folder / DEFAULT_FILE
    if own.is_file():
        return own
    raise ConfigError(
        f"this method is calibrated, and {frontend.prepared.folder} has no {DEFAULT_FILE}; give "
        "--calibration FILE: a text in UTF-8, or JSONL whose lines have `messages` (and perhaps "
        "`tools`) or `text`. Some hundred dialogues or pages like those it will serve are enough."
    )


def read_samples(
    frontend: Frontend, path: Path, *, num_samples: int, seq_len: int
) -> list[list[int]]:
    """Return at most `num_samples` pieces of at most `seq_len` tokens, spread over the file.

    Raises: ConfigError naming the file and the line.
    """
    longest = min(seq_len, frontend.max_model_len)
    pieces = [
        passage[begin : begin + longest]
        for passage in _passages(frontend, path)
        for begin in range(0, len(passage), longest)
    ]
    if not pieces:
        raise ConfigError(f"--calibration {path}: it has no tokens; give a file with some text.")
    count = min(num_samples, len(pieces))
    return [pieces[i * len(pieces) // count] for i in range(count)]


def digest_of(samples: list[list[int]]) -> str:
    """Return a name for the samples that others do not have."""
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()


def _passages(frontend: Frontend, path: Path) -> list[list[int]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {path} cannot be read: {error}.") from error
    if path.suffix.lower() not in JSONL_SUFFIXES:
        return [frontend.require_tokenizer().encode(text)] if text.strip() else []
    lines = enumerate(text.split("\n"), 1)
    return [
        _line_ids(frontend, line, f"--calibration {path}, line {n}")
        for n, line in lines
        if line.strip()
    ]


def _line_ids(frontend: Frontend, line: str, where: str) -> list[int]:
    found = _object(line, where)
    if isinstance(found.get("text"), str):
        return frontend.require_tokenizer().encode(found["text"])
    if not isinstance(found.get("messages"), list):
        raise ConfigError(f"{where}: neither a list `messages` nor a string `text` is there.")
    template, tokenizer = frontend.require_template(), frontend.require_tokenizer()
    try:
        rendered = template.render(
            found["messages"], tools=found.get("tools"), add_generation_prompt=False
        )
        return tokenizer.encode_chat(rendered)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: a {type(found).__name__} where an object is wanted.")
    return found
