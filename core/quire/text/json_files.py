"""Read the small JSON files of a checkpoint folder, so that each mistake names its file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quire.errors import ConfigError, shown

MAX_SHOWN = 80
MAX_JSON_BYTES = 256 * 2**20


def shorten(value: object, limit: int = MAX_SHOWN) -> str:
    """Return `repr(value)` cut to `limit` characters, on one line."""
    part = value[: 2 * limit] if isinstance(value, (str, bytes, list, tuple)) else value
    return shown(part, limit)


def read_text(path: Path) -> str:
    """Return a text file's content. Raises: ConfigError, naming the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_JSON_BYTES} bytes; is it the right file?")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises: ConfigError, naming the file."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not usable JSON ({type(error).__name__}).") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a {type(value).__name__}; a JSON object is needed.")
    return value


def read_optional_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one where there is no such file."""
    return read_json_object(path) if path.exists() else {}


def wrong_value(path: Path, key: str, value: object, allowed: str) -> ConfigError:
    """Return the error for a key whose value cannot be used."""
    return ConfigError(f"{path}: {key} is {shorten(value)}; allowed: {allowed}.")
