"""Write safetensors files by hand, so that each kind of damage can be made."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HEADER_BYTES = 8


def file_bytes(header: Any, data: bytes) -> bytes:
    """Return a file with this header, honest or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """Return one tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def save(folder: Path, tensors: Mapping[str, Tensor], name: str = "model.safetensors") -> Path:
    """Write tensors as the library does and return the file."""
    path = folder / name
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def save_sharded(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write one file a shard and the index; return the index."""
    weight_map = {}
    for file_name, tensors in shards.items():
        save(folder, tensors, file_name)
        weight_map |= dict.fromkeys(tensors, file_name)
    return save_index(folder, weight_map)


def save_index(folder: Path, weight_map: Any) -> Path:
    """Write model.safetensors.index.json."""
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def poisoned(dtype: torch.dtype, count: int, at: int, value: float) -> Tensor:
    """Return ones with one other value."""
    tensor = torch.ones(count, dtype=dtype)
    tensor[at] = value
    return tensor
