"""What a model's quality is measured on: the token ids of a text, or of the dialogues of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from quire.frontend import Frontend


def text_ids(frontend: Frontend, path: Path) -> list[list[int]]:
    """Return the token ids of a text as one passage. Raises: ConfigError."""
    return [frontend.require_tokenizer().encode(_read(path, "--text"))]


def chat_ids(frontend: Frontend, path: Path) -> list[list[int]]:
    """Return the token ids of each dialogue of a JSONL file, through the model's chat template.

    A line is an object with `messages` in OpenAI's form and, if it likes, `tools`.
    Raises: ConfigError naming the line, or where the checkpoint has no chat template.
    """
    template, tokenizer = frontend.require_template(), frontend.require_tokenizer()
    found = []
    for number, line in enumerate(_read(path, "--chat").splitlines(), 1):
        if not line.strip():
            continue
        dialogue = _dialogue(line, f"{path}, line {number}")
        try:
            rendered = template.render(
                dialogue["messages"], tools=dialogue.get("tools"), add_generation_prompt=False
            )
            found.append(tokenizer.encode_chat(rendered))
        except RequestError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
    return found


def cut(passages: list[list[int]], window: int) -> list[list[int]]:
    """Return pieces of at most `window` tokens, and at least the two that one guess needs.

    Raises: ConfigError where nothing is left.
    """
    pieces = [
        passage[begin : begin + window]
        for passage in passages
        for begin in range(0, len(passage), window)
    ]
    kept = [piece for piece in pieces if len(piece) > 1]
    if not kept:
        raise ConfigError("the file has fewer than two tokens, so no token follows another.")
    return kept


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read: {error}.") from error


def _dialogue(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}.") from error
    if not isinstance(found, dict) or not isinstance(found.get("messages"), list):
        raise ConfigError(f"{where}: an object with a list 'messages' is wanted.")
    return found
