"""Find the folder of a model: a path, a bundled checkpoint or the id of a hub. No torch."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from quire.config import nearest
from quire.errors import ConfigError
from quire.interfaces.model_config import shown

CONFIG_FILE = "config.json"
# Where it is 1, ids are ModelScope's.
MODELSCOPE_VARIABLE = "QUIRE_USE_MODELSCOPE"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = "*.safetensors"
_CODE = "*.py"
_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
# Where tools wrote what belongs into config.json's `quantization_config`, and its `quant_method`.
_QUANTIZATION_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


def find_folder(
    model: str,
    *,
    revision: str | None,
    bundled: Collection[str],
    open_bundled: Callable[[str], Path],
    with_weights: bool = True,
    with_code: bool = False,
) -> Path:
    """Return the folder that MODEL names.

    A folder that exists comes first, then a bundled checkpoint, then a Hugging Face id, which is
    downloaded, weights and code only if they are wanted. Raises: ConfigError, saying which of the
    three was tried.
    """
    folder = _existing(model)
    if folder is not None and folder.is_dir():
        return folder
    if model in bundled:
        return open_bundled(model)
    if folder is not None:
        raise ConfigError(f"{model} is a file; MODEL names the folder that holds config.json.")
    if _HUB_ID.fullmatch(model) and not model.startswith("."):
        patterns = [*_FILES, *([_WEIGHTS] * with_weights), *([_CODE] * with_code)]
        return _download(model, revision, patterns)
    names = ", ".join(sorted(bundled)) or "none"
    raise ConfigError(
        f"model {shown(model)}: no such folder, and no bundled checkpoint of that name (bundled: "
        f"{names}).{nearest(model, bundled)} A Hugging Face id looks like 'owner/name'."
    )


def _existing(model: str) -> Path | None:
    """Return the path if there is something; a name that cannot be a path has nothing."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _hub() -> tuple[str, Callable[..., str]]:
    """Return what the hub is called, and its download. Raises: ConfigError."""
    wanted = os.environ.get(MODELSCOPE_VARIABLE, "")
    if wanted.lower() in ("", "0", "false"):
        from huggingface_hub import snapshot_download

        return "Hugging Face", snapshot_download
    if wanted.lower() not in ("1", "true"):
        raise ConfigError(f"{MODELSCOPE_VARIABLE} is {wanted!r}; allowed: 1, true, 0, false.")
    try:
        return "ModelScope", importlib.import_module("modelscope").snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{MODELSCOPE_VARIABLE} is set, and the package modelscope cannot be imported "
            f"({error}); `pip install modelscope` brings it."
        ) from error


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    hub, snapshot_download = _hub()
    options: dict[str, Any] = {"revision": revision, "allow_patterns": patterns}
    with contextlib.suppress(Exception):  # not in the cache: the network is asked next
        folder = Path(snapshot_download(model, local_files_only=True, **options))
        # Weights and code may be missing, after a start that wanted none.
        if all(_has(folder, one) for one in patterns):
            return folder
    try:
        return Path(snapshot_download(model, **options))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigError(
            f"model {model!r}: no such folder here, and it could not be had from {hub} "
            f"({type(error).__name__}: {reason}). Check the name, the network and your access."
        ) from error


def _has(folder: Path, pattern: str) -> bool:
    """Answer whether a folder of the cache has files of a kind, as far as it needs them."""
    if pattern == _CODE and b"auto_map" not in (folder / CONFIG_FILE).read_bytes():
        return True
    return pattern in _FILES or any(folder.glob(pattern))


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model's folder. Raises: ConfigError naming the file and the cause."""
    path = folder / CONFIG_FILE
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: not a file; expected a JSON object of keys.")
    try:
        return _read_object(path)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; a model's folder holds config.json, tokenizer.json and "
            "safetensors files."
        ) from None


def find_quantization(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Path]:
    """Return config.json with its `quantization_config`, and the file that this stands in.

    Raises: ConfigError naming the file and the cause.
    """
    if config.get("quantization_config") is None:
        for name, method in _QUANTIZATION_FILES.items():
            with contextlib.suppress(FileNotFoundError):
                found = {"quant_method": method, **_read_object(folder / name)}
                return {**config, "quantization_config": found}, folder / name
    return config, folder / CONFIG_FILE


def _read_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object. Raises: ConfigError, FileNotFoundError."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds a {type(found).__name__}, expected an object of keys.")
    return found


def architectures(config: dict[str, Any], path: Path) -> list[str]:
    """Return the architectures that config.json names. Raises: ConfigError if there is none."""
    found: Any = config.get("architectures")
    is_list = isinstance(found, list) and found != []
    if not is_list or not all(isinstance(name, str) and name for name in found):
        raise ConfigError(
            f"{path}: key 'architectures' is {shown(found)}; expected a list with the model's "
            'class, such as ["LlamaForCausalLM"].'
        )
    return list(found)
