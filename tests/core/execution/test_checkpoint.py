"""Which files are read as a checkpoint, and that damaged ones are refused by their headers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors_files import entry, file_bytes, poisoned, save, save_index, save_sharded

from quire.errors import CheckpointError
from quire.execution.checkpoint import PROBED_BYTES, Checkpoint, listed

SIX_FLOATS = bytes(24)
GOOD_HEADER = {"a": entry("F32", [6], 0, 24)}
DAMAGED = {
    "empty": b"",
    "four bytes": b"\x01\x02\x03\x04",
    "header longer than 2**60": (1 << 60).to_bytes(8, "little") + b"{}",
    "header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "garbage for a header": file_bytes(b"\xff\xfenot json at all", SIX_FLOATS),
    "a list for a header": file_bytes([1, 2], SIX_FLOATS),
    "a nested header": file_bytes(b'{"a":' * 5000, SIX_FLOATS),
    "truncated data": file_bytes(GOOD_HEADER, SIX_FLOATS[:-1]),
    "more data than the header says": file_bytes(GOOD_HEADER, SIX_FLOATS + b"\0"),
    "a hole": file_bytes(
        {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 16, 24)}, SIX_FLOATS
    ),
    "an overlap": file_bytes(
        {"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 8, 24)}, SIX_FLOATS
    ),
    "a name twice": file_bytes(
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},'
        b'"a":{"dtype":"F32","shape":[3],"data_offsets":[12,24]}}',
        SIX_FLOATS,
    ),
    "a shape that is not its size": file_bytes({"a": entry("F32", [7], 0, 24)}, SIX_FLOATS),
    "a negative shape": file_bytes({"a": entry("F32", [-6], 0, 24)}, SIX_FLOATS),
    "an overflowing shape": file_bytes({"a": entry("F32", [2**62, 4], 0, 24)}, SIX_FLOATS),
    "an offset beyond the file": file_bytes({"a": entry("F32", [6], 2**61, 2**62)}, SIX_FLOATS),
    "an unknown dtype": file_bytes({"a": entry("F31", [6], 0, 24)}, SIX_FLOATS),
    "an entry without a dtype": file_bytes({"a": {"shape": [6]}}, SIX_FLOATS),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_file_is_refused_by_name_in_one_line(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)

    with pytest.raises(CheckpointError, match="not a complete safetensors file") as caught:
        Checkpoint.open(tmp_path)

    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_tensor_that_begins_with_a_bad_number_is_refused_by_name(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    within = PROBED_BYTES // dtype.itemsize - 1
    save(tmp_path, {"good": torch.ones(3), "bad": poisoned(dtype, 1000, within, value)})

    with pytest.raises(CheckpointError, match="'bad' holds NaN or infinity"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_largest_finite_number_is_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    save(tmp_path, {"big": torch.full((4,), torch.finfo(dtype).max, dtype=dtype)})

    assert list(Checkpoint.open(tmp_path).tensors) == ["big"]


def test_integer_tensors_are_not_looked_at_for_nan(tmp_path: Path) -> None:
    save(tmp_path, {"packed": torch.full((8,), -1, dtype=torch.int32)})

    assert Checkpoint.open(tmp_path).tensors["packed"].dtype == "I32"


def test_tensors_are_described_in_the_order_of_the_disk(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "second": entry("F32", [2, 2], 8, 24),
        "first": entry("F16", [4], 0, 8),
    }
    file = tmp_path / "model.safetensors"
    data = file_bytes(header, SIX_FLOATS)
    file.write_bytes(data)

    checkpoint = Checkpoint.open(tmp_path)

    first, second = checkpoint.tensors.values()
    assert (first.name, first.dtype, first.shape, first.num_bytes) == ("first", "F16", (4,), 8)
    assert (second.name, second.shape, second.file) == ("second", (2, 2), file)
    assert second.begin == len(data) - 16
    assert checkpoint.num_bytes == 24


def test_checkpoint_of_several_files_needs_no_index(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(2)}, "x-1.safetensors")
    save(tmp_path, {"b": torch.ones(3)}, "x-2.safetensors")

    assert set(Checkpoint.open(tmp_path).tensors) == {"a", "b"}


def test_tensor_in_two_files_is_refused_naming_both(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(2)}, "x-1.safetensors")
    save(tmp_path, {"a": torch.ones(2)}, "x-2.safetensors")

    with pytest.raises(CheckpointError, match=r"x-2.*'a' is also in x-1"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")

    with pytest.raises(CheckpointError, match="convert them to safetensors") as caught:
        Checkpoint.open(tmp_path)

    assert name in str(caught.value)


def test_folder_without_weights_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights; expected model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_index_is_read_before_other_files(tmp_path: Path) -> None:
    save_sharded(
        tmp_path, {"m-1.safetensors": {"a": torch.ones(2)}, "m-2.safetensors": {"b": torch.ones(2)}}
    )
    save(tmp_path, {"z": torch.ones(2)}, "consolidated.safetensors")

    assert set(Checkpoint.open(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    "shard",
    ["../../../../etc/passwd", "/etc/passwd", "sub/m.safetensors", "..", "../m.safetensors", ""],
)
def test_shard_outside_the_folder_is_refused_unread(tmp_path: Path, shard: str) -> None:
    save_index(tmp_path, {"a": shard})

    with pytest.raises(CheckpointError, match="escapes the model's folder"):
        Checkpoint.open(tmp_path)


def test_shard_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    save_index(tmp_path, {"a": "pytorch_model.bin"})

    with pytest.raises(CheckpointError, match=r"'pytorch_model\.bin' is not a safetensors file"):
        Checkpoint.open(tmp_path)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(2)}, "m-1.safetensors")
    save_index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-3.safetensors"})

    with pytest.raises(CheckpointError, match=r"missing shards: m-2\.safetensors, m-3"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("there", [{"b": "m-1.safetensors"}, {"a": "m-2.safetensors"}])
def test_tensor_that_is_not_in_the_shard_that_the_index_names_is_listed(
    tmp_path: Path, there: dict[str, str]
) -> None:
    save(tmp_path, {"a": torch.ones(2)}, "m-1.safetensors")
    save(tmp_path, {"c": torch.ones(2)}, "m-2.safetensors")
    save_index(tmp_path, {"c": "m-2.safetensors", **there})

    with pytest.raises(CheckpointError, match=f"not in the shard it names: {next(iter(there))}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{not json",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": null}',
        "[" * 200_000,
        "\ufeff{}",
    ],
    ids=range(9),
)
def test_unreadable_index_is_refused_by_name(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)

    with pytest.raises(CheckpointError, match="weight_map") as caught:
        Checkpoint.open(tmp_path)

    assert str(index) in str(caught.value)


def test_long_lists_of_names_are_cut() -> None:
    names = [f"t{i}" for i in range(11)]

    assert listed(names) == "t0, t1, t2, t3, t4, t5, t6, t7 and 3 more"
    assert listed(names[:2]) == "t0, t1"


def test_reading_headers_does_not_import_torch(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"m-1.safetensors": {"a": torch.ones(2)}})
    script = (
        "import json, sys; from pathlib import Path\n"
        "from quire.execution.checkpoint import Checkpoint\n"
        f"found = Checkpoint.open(Path({str(tmp_path)!r}))\n"
        "print(json.dumps([list(found.tensors), 'torch' in sys.modules]))"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert json.loads(done.stdout) == [["a"], False], done.stderr
