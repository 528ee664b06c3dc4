"""Find a checkpoint's safetensors files and check their headers. Never imports torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from attrs import Factory, define, frozen

from quire.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_LISTED = 8

# The first bytes of every tensor are looked at before torch is imported: a file of NaN is found
# in milliseconds. The rest is checked while it is loaded.
PROBED_BYTES = 256
_EXPONENTS = {"F64": ("Q", 0x7FF << 52), "F32": ("I", 0x7F800000), "BF16": ("H", 0x7F80)}
_EXPONENTS["F16"] = ("H", 0x7C00)


@frozen(kw_only=True)
class TensorInfo:
    """One tensor of a file: dtype as safetensors spells it, and where its bytes lie.

    `stored_name` is the file's, where the model is told another.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int
    stored_name: str | None = None


@define(kw_only=True)
class Checkpoint:
    """The tensors of a folder by name, in the order in which they lie on the disk."""

    folder: Path
    tensors: Mapping[str, TensorInfo] = Factory(dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of all files.

        Raises: CheckpointError for files that are missing, damaged, of another format, or that
        begin with numbers that are not finite.
        """
        index = folder / INDEX_FILE
        files = _indexed_files(index) if index.is_file() else _plain_files(folder)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for tensor in _read_header(file):
                if tensor.name in tensors:
                    first = tensors[tensor.name].file.name
                    raise CheckpointError(
                        f"{file}: tensor {tensor.name!r} is also in {first}; keep one of them."
                    )
                tensors[tensor.name] = tensor
        if index.is_file():
            _check_index(index, tensors)
        _probe(tensors)
        return cls(folder=folder, tensors=tensors)


def listed(names: list[str]) -> str:
    """Return the first names and how many more there are."""
    shown = ", ".join(names[:MAX_LISTED])
    more = len(names) - MAX_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def _plain_files(folder: Path) -> list[Path]:
    single = folder / WEIGHTS_FILE
    if single.is_file():
        return [single]
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if found:
        return found
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{folder}: weights are pickled ({listed(pickled)}), which can run any code when "
            "read; convert them to safetensors (Transformers: save_pretrained) and try again."
        )
    raise CheckpointError(
        f"{folder}: no weights; expected {WEIGHTS_FILE} or {INDEX_FILE} beside config.json."
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        valid = isinstance(weight_map, dict) and all(
            isinstance(value, str) for value in weight_map.values()
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no readable weight_map ({error}).") from None
    if not valid or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names.")
    return weight_map


def _indexed_files(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    folder = index.parent
    for name in names:
        if name != Path(name).name or name in ("", ".", ".."):
            raise CheckpointError(f"{index}: shard {name!r} escapes the model's folder.")
        if len(name) > 255:
            raise CheckpointError(f"{index}: a shard's name has {len(name)} characters.")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {name!r} is not a safetensors file.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: missing shards: {listed(missing)}; download them again.")
    return [folder / name for name in names]


def _check_index(index: Path, tensors: Mapping[str, TensorInfo]) -> None:
    weight_map = _weight_map(index)
    wrong = sorted(
        name
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file.name != file
    )
    if wrong:
        raise CheckpointError(
            f"{index}: tensors that are not in the shard it names: {listed(wrong)}."
        )


def _read_header(file: Path) -> list[TensorInfo]:
    # The library checks lengths, offsets, shapes and dtypes against the file's size.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"), file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error}); download it again."
        ) from None
    header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found.append(
            TensorInfo(
                name=name,
                file=file,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                begin=8 + length + begin,
                num_bytes=end - begin,
            )
        )
    return sorted(found, key=lambda tensor: tensor.begin)


def _probe(tensors: Mapping[str, TensorInfo]) -> None:
    streams = {}
    try:
        for tensor in tensors.values():
            if tensor.file not in streams:
                streams[tensor.file] = tensor.file.open("rb")
            stream = streams[tensor.file]
            stream.seek(tensor.begin)
            if not _is_finite(tensor.dtype, stream.read(min(PROBED_BYTES, tensor.num_bytes))):
                raise not_finite(tensor)
    finally:
        for stream in streams.values():
            stream.close()


def not_finite(tensor: TensorInfo) -> CheckpointError:
    """Return the error for a tensor that holds NaN or infinity."""
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} holds NaN or infinity; the file is damaged or "
        "the training diverged."
    )


def cannot_hold(tensor: TensorInfo, dtype: str) -> CheckpointError:
    """Return the error for a tensor whose numbers PyTorch's `dtype` cannot hold."""
    name = dtype.removeprefix("torch.")
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} holds numbers that {name} cannot; "
        "use --dtype bfloat16 or float32."
    )


def wrong_kind(tensor: TensorInfo, dtype: str) -> CheckpointError:
    """Return the error for whole numbers where others are expected, or the other way round."""
    wanted = dtype.removeprefix("torch.")
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, expected {wanted}."
    )


def _is_finite(dtype: str, data: bytes) -> bool:
    if dtype not in _EXPONENTS:
        return True
    code, exponent = _EXPONENTS[dtype]
    count = len(data) // struct.calcsize(code)
    numbers = struct.unpack(f"<{count}{code}", data[: count * struct.calcsize(code)])
    return all(number & exponent != exponent for number in numbers)


def num_elements(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return math.prod(shape)
