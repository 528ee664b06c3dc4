"""CUDA graphs of steps: each size is captured once and replayed."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from attrs import define
from torch import Tensor

from quire.errors import KernelError
from quire.execution.static_step import Ending, Loaded, StaticStep
from quire.interfaces.attention import AttentionBackend, AttentionSpec, GraphSupport
from quire.interfaces.batch import Batch
from quire.scheduling.output import SchedulerOutput

# Steps up to this size cost the host more than the device, so that padding is free; larger ones are
# run as they are where more than a share of MAX_PADDING would be computed for nothing.
CHEAP = 1024
MAX_PADDING = 0.04
# The largest step of latents that is captured: in a graph none of its sequences has the plain form.
MOST_ABSORBED = 512


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


def captures_any(backends: Iterable[AttentionBackend | type[AttentionBackend]]) -> bool:
    """Whether steps of any batch can be captured: by every backend."""
    return all(backend.graph_support is GraphSupport.ANY for backend in backends)


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Return the numbers of sequences that are captured: dense where padding would cost much."""
    sizes = [1, 2, 3, 4, 6, 8, *range(12, 33, 4), *range(40, 129, 8), *range(144, 257, 16)]
    sizes += range(288, 513, 32)
    return sorted({size for size in sizes if size < max_num_seqs} | {min(max_num_seqs, 512)})


def mixed_sizes(max_num_batched_tokens: int, specs: Iterable[AttentionSpec]) -> list[int]:
    """Return the numbers of tokens that are captured: few of the large ones, see `MAX_PADDING`."""
    if any(spec.latent is not None for spec in specs):
        max_num_batched_tokens = min(max_num_batched_tokens, MOST_ABSORBED)
    sizes = [16, 32, 48, 64, 96, 128, 160, 192, 224, *range(256, 513, 64), *range(640, 1025, 128)]
    sizes += [2048, 4096, 8192, 16384]
    most = max(max_num_batched_tokens, 2)
    return sorted({size for size in sizes if size < most} | {min(most, 16384)})


# A step's size and ending, and whether only its end is meant.
_Key = tuple[int, Ending, bool]


@define(kw_only=True)
class _Captured:
    replay: Callable[[], Any]
    result: Tensor


class StepGraphs:
    """Run steps of one kind, by replay where they were captured.

    The first step of a size and an ending runs as it is, which compiles and warms up; the second
    is captured, between steps.
    """

    def __init__(self, step: StaticStep, sizes: Sequence[int], capture: Capture) -> None:
        self._step = step
        self.sizes = list(sizes)
        self._capture = capture
        self.replays = True  # False: captured steps run as they are
        self._is_full = False  # no memory was left for another graph
        self._batches: dict[int, Batch] = {}
        self._captured: dict[_Key, _Captured] = {}
        self._warm: set[_Key] = set()

    @property
    def num_captured(self) -> int:
        """Graphs that there are."""
        return len(self._captured)

    def size_for(self, number: int) -> int | None:
        """Return the smallest size that holds so many; None if there is none, or it costs more."""
        place = bisect.bisect_left(self.sizes, number)
        if place == len(self.sizes):
            return None
        size = self.sizes[place]
        return size if size <= CHEAP or number >= size * (1 - MAX_PADDING) else None

    def warm_up(
        self, sizes: Sequence[int], endings: Sequence[Ending], *, is_compiled: bool
    ) -> None:
        """Capture ahead, after a run with padding alone where kernels are still to be compiled."""
        for size in sizes:
            self._step.begin_padding(size)
            batch = self.batch(size)
            for ending in endings:
                key = (size, ending, False)
                if is_compiled:
                    self._warm.add(key)
                else:
                    self._run(size, ending, None)
                self._step.plan(batch, None)
                self._capture_step(key, functools.partial(self._step.run, batch, ending))

    def begin(self, output: SchedulerOutput, size: int) -> Loaded:
        """Enqueue the upload of a step's inputs."""
        return self._step.begin(output, size)

    def run(self, loaded: Loaded, size: int, ending: Ending) -> Tensor:
        """Enqueue the step; return what `StaticStep.run` does, padding included.

        The memory is written again by the next step.
        """
        return self._run(size, ending, loaded)

    def end(self, size: int, ending: Ending) -> Tensor:
        """Enqueue the end of the step that was run last, for its logits; return as `run`."""
        batch = self.batch(size)
        return self._replayed((size, ending, True), lambda: self._step.end(batch, ending))

    def batch(self, size: int) -> Batch:
        """Return the batch of a size."""
        if size not in self._batches:
            self._batches[size] = self._step.batch(size)
        return self._batches[size]

    def _run(self, size: int, ending: Ending, loaded: Loaded | None) -> Tensor:
        batch = self.batch(size)
        self._step.plan(batch, loaded)
        return self._replayed((size, ending, False), lambda: self._step.run(batch, ending))

    def _replayed(self, key: _Key, run: Callable[[], Tensor]) -> Tensor:
        """Run by replay, after a capture the second time."""
        if not self.replays:
            return run()
        found = self._captured.get(key)
        if found is None and key in self._warm:
            found = self._captured_if_it_fits(key, run)
        if found is None:
            self._warm.add(key)
            return run()
        found.replay()
        return found.result

    def _captured_if_it_fits(self, key: _Key, run: Callable[[], Tensor]) -> _Captured | None:
        """Capture a step; None where the memory does not suffice, and it is not tried again."""
        if self._is_full:
            return None
        try:
            return self._capture_step(key, run)
        except torch.cuda.OutOfMemoryError:
            self._is_full = True
            return None

    def _capture_step(self, key: _Key, run: Callable[[], Tensor]) -> _Captured:
        """Capture a step that is planned."""
        replay, result = self._capture(run)
        found = self._captured[key] = _Captured(replay=replay, result=result)
        return found
