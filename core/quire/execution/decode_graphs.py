"""CUDA graphs of steps of one token a sequence: each size is captured once and replayed."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from attrs import define
from torch import Tensor

from quire.errors import KernelError
from quire.execution.decode_step import DecodeStep, Decoding, Ending
from quire.interfaces.batch import Batch
from quire.scheduling.output import SchedulerOutput


class Capture(Protocol):
    """Record what `run` enqueues; return how to enqueue it again, and its result."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]: ...


class CudaCapture:
    """Capture on a stream of its own, all graphs in one pool of memory.

    They run one after another, so that they may share it.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """Capture. Raises: KernelError where `run` does what no graph can hold, such as waiting."""
        try:
            return self._captured(run)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise KernelError(
                f"a step cannot be captured as a CUDA graph: {error}. --enforce-eager turns graphs "
                "off."
            ) from error

    def _captured(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph.replay, result


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the sizes that are captured: dense where padding would cost much."""
    sizes = [1, 2, 3, 4, 6, 8, *range(12, 33, 4), *range(40, 129, 8), *range(144, 257, 16)]
    sizes += range(288, 513, 32)
    return sorted({size for size in sizes if size < max_num_seqs} | {min(max_num_seqs, 512)})


@define(kw_only=True)
class _Captured:
    replay: Callable[[], Any]
    result: Tensor


class DecodeGraphs:
    """Run steps of one token a sequence, by replay where they were captured.

    The first step of a size and an ending runs as it is, which compiles and warms up; the second
    is captured, between steps.
    """

    def __init__(self, step: DecodeStep, sizes: Sequence[int], capture: Capture) -> None:
        self._step = step
        self.sizes = list(sizes)
        self._capture = capture
        self._batches: dict[int, Batch] = {}
        self._captured: dict[tuple[int, Ending], _Captured] = {}
        self._warm: set[tuple[int, Ending]] = set()

    @property
    def num_captured(self) -> int:
        """Graphs that there are."""
        return len(self._captured)

    def size_for(self, num_seqs: int) -> int | None:
        """Return the smallest size that holds so many sequences; None if there is none."""
        place = bisect.bisect_left(self.sizes, num_seqs)
        return self.sizes[place] if place < len(self.sizes) else None

    def warm_up(self, sizes: Sequence[int], endings: Sequence[Ending]) -> None:
        """Compile and capture ahead, with padding alone."""
        for size in sizes:
            self._step.begin_padding(size)
            for ending in endings:
                for _ in range(2):
                    self._run(size, ending, None)

    def begin(self, output: SchedulerOutput, size: int) -> Decoding:
        """Enqueue the upload of a step's inputs."""
        return self._step.begin(output, size)

    def run(self, decoding: Decoding, size: int, ending: Ending) -> Tensor:
        """Enqueue the step; return what `DecodeStep.run` does, padding included.

        The memory is written again by the next step.
        """
        return self._run(size, ending, decoding)

    def batch(self, size: int) -> Batch:
        """Return the batch of a size."""
        if size not in self._batches:
            self._batches[size] = self._step.batch(size)
        return self._batches[size]

    def _run(self, size: int, ending: Ending, decoding: Decoding | None) -> Tensor:
        batch, key = self.batch(size), (size, ending)
        self._step.plan(batch, decoding)
        found = self._captured.get(key)
        if found is None and key in self._warm:
            replay, result = self._capture(lambda: self._step.run(batch, ending))
            found = self._captured[key] = _Captured(replay=replay, result=result)
        if found is None:
            self._warm.add(key)
            return self._step.run(batch, ending)
        found.replay()
        return found.result
