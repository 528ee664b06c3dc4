"""Chunks come in order through a few buffers, and what goes wrong in a thread is told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors_files import save
from toy_model import build_toy, toy_tensors

from quire.errors import CheckpointError
from quire.execution import staged_files
from quire.execution.checkpoint import Checkpoint, TensorInfo
from quire.execution.dummy_weights import draw_weights
from quire.execution.staged_files import Chunk, ReadAhead, chunks_of
from quire.execution.weights import load_weights

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tensor(file: Path, begin: int, num_bytes: int) -> TensorInfo:
    return TensorInfo(
        name="x", file=file, dtype="U8", shape=(num_bytes,), begin=begin, num_bytes=num_bytes
    )


def buffers(count: int, size: int) -> list[torch.Tensor]:
    return [torch.empty(size, dtype=torch.uint8) for _ in range(count)]


def test_chunks_cover_each_tensor_and_none_reaches_into_the_next() -> None:
    file = Path("f")

    found = list(chunks_of([tensor(file, 100, 10), tensor(file, 110, 0), tensor(file, 110, 4)], 4))

    sizes = [(100, 4), (104, 4), (108, 2), (110, 4)]
    assert found == [Chunk(file, begin, size) for begin, size in sizes]


@pytest.mark.parametrize("num_buffers", [1, 2, 5])
def test_chunks_of_several_files_come_in_order(tmp_path: Path, num_buffers: int) -> None:
    data = bytes(range(200))
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(data)
    chunks = list(chunks_of([tensor(file, 3, 150) for file in files], 32))

    ahead = ReadAhead(iter(chunks), buffers(num_buffers, 32))
    found = b""
    for _ in chunks:
        found += bytes(ahead.take().tolist())
        ahead.give_back(None)
    ahead.close()

    assert found == data[3:153] * 2


def test_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(b"12")

    ahead = ReadAhead(chunks_of([tensor(file, 0, 5)], 8), buffers(2, 8))
    with pytest.raises(CheckpointError, match="short: became shorter"):
        ahead.take()
    ahead.close()


def test_refused_checkpoint_leaves_no_thread(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].int()
    save(tmp_path, tensors)
    checkpoint = Checkpoint.open(tmp_path)
    source = staged_files.StagedFiles(list(checkpoint.tensors.values()), torch.device("cpu"))

    with pytest.raises(CheckpointError):
        source.fill(checkpoint.tensors["lm_head.weight"], torch.empty(11, 8))
    source.close()

    assert not [t for t in threading.enumerate() if t.name.startswith("quire-weights")]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [48, 32 << 20])
def test_gpu_holds_what_the_cpu_holds(
    tmp_path: Path, stored: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_files, "BUFFER_BYTES", size)
    save(tmp_path, toy_tensors(dtype=stored))
    models = [build_toy(device=device) for device in ("cpu", "cuda")]
    for model in models:
        load_weights(model, Checkpoint.open(tmp_path))

    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.gpu
@needs_gpu
def test_gpu_names_the_tensor_that_is_not_finite(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors["model.embed_tokens.weight"][-1, -1] = float("nan")
    save(tmp_path, tensors)

    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight' holds NaN"):
        load_weights(build_toy(device="cuda"), Checkpoint.open(tmp_path))


@pytest.mark.gpu
@needs_gpu
def test_gpu_draws_its_own_weights() -> None:
    model = build_toy(device="cuda", dtype=torch.bfloat16)

    draw_weights(model, seed=0)

    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in model.parameters())
