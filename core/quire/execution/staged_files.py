"""Bring tensors to a GPU through a few pinned buffers: threads read ahead, the GPU converts.

The host holds no tensor, and waits for the GPU once: when all are there and were found finite.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from attrs import define, frozen
from torch import Tensor

from quire.errors import CheckpointError
from quire.execution.checkpoint import TensorInfo, cannot_hold, not_finite, wrong_kind

# Each with a thread: one alone copies out of the system's cache of files slower than a GPU's link
# takes it (two cores: 3.7 GB/s).
NUM_BUFFERS = 8
BUFFER_BYTES = 16 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@frozen
class Chunk:
    """Bytes of a file that fit in a buffer."""

    file: Path
    begin: int
    num_bytes: int


def chunks_of(tensors: Sequence[TensorInfo], largest: int) -> Iterator[Chunk]:
    """Cut tensors, one after another, into chunks of at most so many bytes."""
    for tensor in tensors:
        for offset in range(0, tensor.num_bytes, largest):
            size = min(largest, tensor.num_bytes - offset)
            yield Chunk(tensor.file, tensor.begin + offset, size)


@define
class _Read:
    """A chunk that is being read into a buffer."""

    buffer: Tensor
    num_bytes: int
    done: Future[None]


class ReadAhead:
    """Read chunks in order, each buffer by a thread of its own, ahead of who takes them."""

    def __init__(self, chunks: Iterator[Chunk], buffers: Sequence[Tensor]) -> None:
        self._chunks = chunks
        self._files: dict[Path, int] = {}
        self._threads = ThreadPoolExecutor(len(buffers), thread_name_prefix="quire-weights")
        self._reads: deque[_Read] = deque()
        for buffer in buffers:
            self._read_next(buffer, None)

    def take(self) -> Tensor:
        """Wait for the next chunk and return its bytes, a view of a buffer.

        Raises: CheckpointError where the file cannot be read.
        """
        read = self._reads[0]
        read.done.result()
        return read.buffer[: read.num_bytes]

    def give_back(self, used: torch.cuda.Event | None) -> None:
        """Read on into the buffer that was taken, once the GPU has passed `used`."""
        self._read_next(self._reads.popleft().buffer, used)

    def _read_next(self, buffer: Tensor, used: torch.cuda.Event | None) -> None:
        chunk = next(self._chunks, None)
        if chunk is None:
            return
        if chunk.file not in self._files:
            self._files[chunk.file] = os.open(chunk.file, os.O_RDONLY)
        done = self._threads.submit(_read, self._files[chunk.file], chunk, buffer, used)
        self._reads.append(_Read(buffer, chunk.num_bytes, done))

    def close(self) -> None:
        """End the threads and close the files."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def _read(descriptor: int, chunk: Chunk, buffer: Tensor, used: torch.cuda.Event | None) -> None:
    if used is not None:
        used.synchronize()
    memory = buffer.numpy().data
    done = 0
    while done < chunk.num_bytes:
        try:
            count = os.preadv(descriptor, [memory[done : chunk.num_bytes]], chunk.begin + done)
        except OSError as error:
            raise CheckpointError(f"{chunk.file}: cannot be read ({error}).") from error
        if count == 0:
            raise CheckpointError(f"{chunk.file}: became shorter while it was read.")
        done += count


class StagedFiles:
    """Fill tensors in the order of `tensors`; `check` says whether all were finite.

    Copies, conversions and checks are queued on the current stream. A second one would only add
    something to order: the GPU's memory is many times faster than its link to the host, so that
    converting and checking take no time that counts.
    """

    def __init__(self, tensors: Sequence[TensorInfo], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        buffers = [
            torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu)
            for _ in range(NUM_BUFFERS)
        ]
        self._ahead = ReadAhead(chunks_of(tensors, BUFFER_BYTES), buffers)
        self._checked: list[tuple[TensorInfo, str]] = []
        self._flags: list[Tensor] = []  # [target is finite, what the file holds is finite]

    def fill(self, tensor: TensorInfo, target: Tensor) -> None:
        """Queue the copy of a tensor. Raises: CheckpointError if it is of another kind."""
        stored = DTYPES.get(tensor.dtype)
        if stored is None or stored.is_floating_point != target.is_floating_point():
            raise wrong_kind(tensor, str(target.dtype))
        is_direct = stored == target.dtype and target.is_contiguous()
        landing = target
        if not is_direct:
            landing = torch.empty(tensor.shape, dtype=stored, device=target.device)
        self._send(landing)
        if not is_direct:
            target.copy_(landing)
        if target.is_floating_point() and target.numel():
            self._note(tensor, target, landing)

    def _send(self, landing: Tensor) -> None:
        """Fill a contiguous tensor with the next chunks."""
        memory, done = landing.view(-1).view(torch.uint8), 0
        while done < memory.numel():
            data = self._ahead.take()
            memory[done : done + data.numel()].copy_(data, non_blocking=True)
            done += data.numel()
            used = torch.cuda.Event() if self._on_gpu else None
            if used is not None:
                used.record()
            self._ahead.give_back(used)

    def _note(self, tensor: TensorInfo, target: Tensor, landing: Tensor) -> None:
        flags = [_is_finite(target), _is_finite(landing)] if landing is not target else []
        flags = flags or [_is_finite(target)] * 2
        self._checked.append((tensor, str(target.dtype)))
        self._flags.append(torch.stack(flags))

    def check(self) -> None:
        """Wait for all copies. Raises: CheckpointError naming a tensor that is not finite."""
        if not self._flags:
            return
        flags: list[list[bool]] = torch.stack(self._flags).tolist()
        for (tensor, dtype), (fits, is_finite) in zip(self._checked, flags, strict=True):
            if not is_finite:
                raise not_finite(tensor)
            if not fits:
                raise cannot_hold(tensor, dtype)

    def close(self) -> None:
        """End the threads and close the files."""
        self._ahead.close()


def _is_finite(tensor: Tensor) -> Tensor:
    """Return a flag on the tensor's device: NaN and infinity come out as an extreme."""
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.bfloat16)  # formats of 8 bits know no minimum
    low, high = torch.aminmax(tensor)
    return torch.isfinite(low) & torch.isfinite(high)
