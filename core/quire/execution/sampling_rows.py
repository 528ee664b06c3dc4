"""How each persistent row is sampled: parameters on the device, by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attrs import define, evolve
from torch import Tensor

from quire.execution.batch_builder import BuiltBatch, Ints
from quire.execution.staging import to_device
from quire.interfaces.sampling import SamplingBatch
from quire.scheduling.output import AddedSequence


@define(kw_only=True)
class _Gathered:
    """The parameters of one choice of rows, which mostly stays the same from step to step."""

    rows: list[int]
    batch: SamplingBatch


class SamplingRows:
    """Hold what `AddedSequence.params` say, by row; on a CPU the device's tensors are the host's.

    The last row belongs to nobody: rows that pad a batch name it, and are greedy.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = str(device)
        # Columns: temperature, top_p, min_p; top_k, seed, child index.
        self._reals = np.zeros((3, num_rows + 1), np.float32)
        self._whole = np.zeros((3, num_rows + 1), np.int64)
        self._temperature, self._top_p, self._min_p = self._reals
        self._top_k, self._seed, self._child = self._whole
        self._top_p[:] = 1.0
        self._top_k[:] = vocab_size
        self._device_reals = torch.from_numpy(self._reals).to(device)
        self._device_whole = torch.from_numpy(self._whole).to(device)
        self._changed: list[int] = []  # rows that the device has not heard of
        # Rows that must not end yet: the position from which they may, and their stop tokens.
        self._may_stop_from: dict[int, tuple[int, list[int]]] = {}
        self._gathered: _Gathered | None = None
        self.version = 0  # grows with each change
        self._flags: tuple[list[int], dict[str, bool]] = ([], {})

    def add(self, added: AddedSequence) -> None:
        """Take over the parameters of a sequence that takes a row."""
        row, params = added.row, added.params
        self._temperature[row] = 0.0 if params.is_greedy else params.temperature
        limited = 0 < params.top_k < self._vocab_size
        self._top_k[row] = params.top_k if limited else self._vocab_size
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seed[row] = np.uint64(added.seed % 2**64).astype(np.int64)
        self._child[row] = added.index
        self._may_stop_from.pop(row, None)
        if params.min_tokens > 0 and added.stop_token_ids:
            first = added.num_prompt_tokens + params.min_tokens
            self._may_stop_from[row] = (first, sorted(added.stop_token_ids))
        self._changed.append(row)
        self.version += 1
        self._gathered = None
        self._flags = ([], {})

    def tell_device(self) -> None:
        """Enqueue the parameters of rows that changed."""
        if self._changed and self._device != "cpu":
            rows = sorted(set(self._changed))
            index = to_device(rows, torch.int64, self._device)
            for held, values in (
                (self._device_reals, self._reals),
                (self._device_whole, self._whole),
            ):
                held.index_copy_(1, index, to_device(values[:, rows], held.dtype, self._device))
        self._changed.clear()

    def batch(self, built: BuiltBatch) -> SamplingBatch:
        """Return what the sampler needs for the rows of this step."""
        self.tell_device()
        rows = built.sampled_rows
        if self._gathered is None or self._gathered.rows != rows:
            device_rows = to_device(rows, torch.int32, self._device)
            batch = self.gather(device_rows, device_rows, **self.flags(rows))
            self._gathered = _Gathered(rows=rows, batch=batch)
        batch = self._gathered.batch
        return evolve(
            batch,
            position=self._positions(built.sampled_positions, batch),
            suppressed=self._suppressed(built),
        )

    def flags(self, rows: list[int]) -> dict[str, bool]:
        """Return what no row asks for and all rows are, as `SamplingBatch` has them."""
        if self._flags[0] != rows:
            self._flags = (rows, self._look_at(rows))
        return self._flags[1]

    def _look_at(self, rows: list[int]) -> dict[str, bool]:
        greedy = self._temperature[rows] == 0
        drawn = np.asarray(rows, np.int64)[~greedy]
        return {
            "all_greedy": bool(greedy.all()),
            "any_greedy": bool(greedy.any()),
            "any_top_k": bool((self._top_k[drawn] < self._vocab_size).any()),
            "any_top_p": bool((self._top_p[drawn] < 1).any()),
            "any_min_p": bool((self._min_p[drawn] > 0).any()),
        }

    def gather(self, rows: Tensor, position: Tensor, **flags: Any) -> SamplingBatch:
        """Return the parameters of `rows`, int32 on the device, for draws at `position`."""
        return self.as_batch(*self.columns(rows), rows, position, **flags)

    def empty_columns(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return memory for the columns of so many rows, and for int64 rows."""
        reals = torch.zeros((3, count), dtype=torch.float32, device=self._device)
        whole = torch.zeros((3, count), dtype=torch.int64, device=self._device)
        return reals, whole, torch.zeros(count, dtype=torch.int64, device=self._device)

    def columns(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `as_batch` takes: float32 and int64 [3, num_rows], of the device's rows."""
        return self._device_reals.index_select(1, rows), self._device_whole.index_select(1, rows)

    @staticmethod
    def as_batch(
        reals: Tensor, whole: Tensor, rows: Tensor, position: Tensor, **flags: Any
    ) -> SamplingBatch:
        """Return a batch whose parameters are these columns."""
        temperature, top_p, min_p = reals.unbind()
        top_k, seed, child = whole.unbind()
        return SamplingBatch(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            child_index=child,
            position=position,
            rows=rows,
            **flags,
        )

    def _positions(self, positions: Ints, batch: SamplingBatch) -> Tensor:
        # Greedy rows draw nothing, so their positions are never read.
        if batch.all_greedy:
            return batch.child_index
        return to_device(positions, torch.int64, self._device)

    def holds_back(self, rows: list[int]) -> bool:
        """Whether any row may have tokens that it must not draw yet."""
        return any(row in self._may_stop_from for row in rows)

    def _suppressed(self, built: BuiltBatch) -> tuple[Tensor, Tensor] | None:
        """Return (row of the logits, token id) pairs of stop tokens that come too early."""
        if not self._may_stop_from:
            return None
        rows: list[int] = []
        token_ids: list[int] = []
        for i, row in enumerate(built.sampled_rows):
            first, stops = self._may_stop_from.get(row, (0, []))
            if built.sampled_positions[i] < first:
                rows += [i] * len(stops)
                token_ids += stops
        if not rows:
            return None
        pairs = to_device([rows, token_ids], torch.int64, self._device)
        return pairs[0], pairs[1]
