"""The folder that a quantized checkpoint is written into: whole files, found again after a stop.

While the work goes on, `STATE_FILE` says what is being made and which files are finished, with a
digest of each. It goes away last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from quire.errors import ConfigError
from quire.execution.checkpoint import INDEX_FILE
from quire.execution.model_folder import CONFIG_FILE
from quire.pooling_setup import module_files

STATE_FILE = "quantize-state.json"
PARTIAL = ".partial"
# What is carried over from the source; weights, their index and config.json are made anew.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
NOT_COPIED = (CONFIG_FILE, INDEX_FILE, "hf_quant_config.json", "quantize_config.json", STATE_FILE)
READ_BYTES = 1 << 20


class OutputFolder:
    """Write shards and what belongs to them, each at once or not at all.

    The folder is there, and `locked`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], num_shards: int) -> None:
        """Begin, or go on where the same settings stopped.

        Raises: ConfigError for a folder with other content, or for other settings than those that
        it was begun with, naming them.
        """
        self.path = path
        self.num_shards = num_shards
        self._settings = json.loads(json.dumps(settings))
        self._shards: dict[str, dict[str, Any]] = {}
        for file in path.glob(f"*{PARTIAL}"):
            file.unlink()
        if (path / STATE_FILE).is_file():
            self._resume()
            return
        content = sorted(file.name for file in path.iterdir())
        if content:
            shown = ", ".join(content[:3]) + (" and more" if len(content) > 3 else "")
            raise ConfigError(
                f"--output {path} is not empty ({shown}); name an empty or new folder. One that an "
                "interrupted `quire quantize` left goes on with the same command."
            )
        self._save_state()

    def _resume(self) -> None:
        file = self.path / STATE_FILE
        try:
            state = json.loads(file.read_bytes())
            begun, shards = state["settings"], state["shards"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}: not readable ({error}); remove the folder.") from None
        different = sorted(
            name
            for name in {*begun, *self._settings}
            if begun.get(name) != self._settings.get(name)
        )
        if different:
            told = "; ".join(
                f"{name} was {begun.get(name)!r} and is {self._settings.get(name)!r}"
                for name in different
            )
            raise ConfigError(
                f"--output {self.path} was begun with other settings: {told}. Give the same, or "
                "name another folder."
            )
        self._shards = {name: note for name, note in shards.items() if self._is_whole(name, note)}

    def _is_whole(self, name: str, note: Mapping[str, Any]) -> bool:
        file = self.path / name
        return file.is_file() and digest_of_file(file) == note["sha256"]

    def shard_name(self, index: int) -> str:
        """Return the name of a shard, counted from 0."""
        return f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def note_of(self, index: int) -> dict[str, Any] | None:
        """Return what was noted of a finished shard, None of one that is not."""
        found = self._shards.get(self.shard_name(index))
        return None if found is None else found["note"]

    def write_shard(self, index: int, tensors: Mapping[str, Tensor], note: Any) -> None:
        """Write a shard and what is to be remembered of it."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        name = self.shard_name(index)
        partial = self.path / (name + PARTIAL)
        try:
            save_file(dict(tensors), partial, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise _cannot_be_written(self.path, error) from None
        partial.chmod(0o644)  # the library lets nobody else read it
        _settle(partial, self.path / name)
        sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
        digest = digest_of_file(self.path / name)
        self._shards[name] = {"sha256": digest, "note": note, "tensors": sizes}
        self._save_state()

    def read_shard(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a finished shard."""
        from safetensors.torch import load_file

        return load_file(self.path / self.shard_name(index))

    def finish(self, config: Mapping[str, Any], source: Path) -> int:
        """Write the index and config.json, copy the rest; return the bytes of all tensors."""
        sizes = {k: size for shard in self._shards.values() for k, size in shard["tensors"].items()}
        weight_map = {k: name for name, shard in self._shards.items() for k in shard["tensors"]}
        total = sum(sizes.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        self._write_json(INDEX_FILE, index)
        for file in [*copied_files(source), *module_files(source)]:
            target = self.path / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            partial = target.with_name(target.name + PARTIAL)
            shutil.copyfile(file, partial)
            _settle(partial, target)
        self._write_json(CONFIG_FILE, config)
        (self.path / STATE_FILE).unlink()
        return total

    def _save_state(self) -> None:
        self._write_json(STATE_FILE, {"settings": self._settings, "shards": self._shards})

    def _write_json(self, name: str, content: Any) -> None:
        partial = self.path / (name + PARTIAL)
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        _settle(partial, self.path / name)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make a folder, and keep it for this process alone.

    Raises: ConfigError if it is taken, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output {path} is a file; name a folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _cannot_be_written(path, error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(
            f"--output {path}: another `quire quantize` writes into it; wait for it, or name "
            "another folder."
        ) from None
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(path):
            raise
        raise _cannot_be_written(path, error) from None
    finally:
        os.close(handle)


def _cannot_be_written(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"--output {path} cannot be written ({error}); name a folder that can, with enough room."
    )


def copied_files(source: Path) -> list[Path]:
    """Return the files of a checkpoint that are not weights or about them."""
    found = {file for pattern in COPIED for file in source.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.name not in NOT_COPIED)


def digest_of_file(file: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _settle(partial: Path, final: Path) -> None:
    """Give a file that is wholly on the disk its name."""
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, final)
