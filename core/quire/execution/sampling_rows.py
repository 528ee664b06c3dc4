"""How each persistent row is sampled: parameters on the device, gathered only when rows change."""

from __future__ import annotations

import numpy as np
import torch
from attrs import define
from torch import Tensor

from quire.execution.batch_builder import BuiltBatch, Ints
from quire.interfaces.sampling import SamplingBatch
from quire.scheduling.output import AddedSequence


@define(kw_only=True)
class _Gathered:
    """The parameters of one choice of rows, which mostly stays the same from step to step."""

    rows: list[int]
    device_rows: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    child_index: Tensor
    flags: dict[str, bool]


class SamplingRows:
    """Hold what `AddedSequence.params` say, by row."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._temperature = np.zeros(num_rows, np.float32)
        self._top_k = np.full(num_rows, vocab_size, np.int64)
        self._top_p = np.ones(num_rows, np.float32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._seed = np.zeros(num_rows, np.int64)
        self._child = np.zeros(num_rows, np.int64)
        # Rows that must not end yet: the position from which they may, and their stop tokens.
        self._may_stop_from: dict[int, tuple[int, list[int]]] = {}
        self._gathered: _Gathered | None = None

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
        self._gathered = None

    def batch(self, built: BuiltBatch) -> SamplingBatch:
        """Return what the sampler needs for the rows of this step."""
        gathered = self._gathered
        if gathered is None or gathered.rows != built.sampled_rows:
            gathered = self._gathered = self._gather(built.sampled_rows)
        return SamplingBatch(
            temperature=gathered.temperature,
            top_k=gathered.top_k,
            top_p=gathered.top_p,
            min_p=gathered.min_p,
            seed=gathered.seed,
            child_index=gathered.child_index,
            position=self._positions(built.sampled_positions, gathered),
            rows=gathered.device_rows,
            suppressed=self._suppressed(built) if self._may_stop_from else None,
            **gathered.flags,
        )

    def _gather(self, rows: list[int]) -> _Gathered:
        def send(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values[rows]).to(self._device)

        greedy = self._temperature[rows] == 0
        drawn = np.asarray(rows, np.int64)[~greedy]
        flags = {
            "all_greedy": bool(greedy.all()),
            "any_greedy": bool(greedy.any()),
            "any_top_k": bool((self._top_k[drawn] < self._vocab_size).any()),
            "any_top_p": bool((self._top_p[drawn] < 1).any()),
            "any_min_p": bool((self._min_p[drawn] > 0).any()),
        }
        return _Gathered(
            rows=rows,
            device_rows=torch.tensor(rows, dtype=torch.int32).to(self._device),
            temperature=send(self._temperature),
            top_k=send(self._top_k),
            top_p=send(self._top_p),
            min_p=send(self._min_p),
            seed=send(self._seed),
            child_index=send(self._child),
            flags=flags,
        )

    def _positions(self, positions: Ints, gathered: _Gathered) -> Tensor:
        # Greedy rows draw nothing, so their positions are never read.
        if gathered.flags["all_greedy"]:
            return gathered.child_index
        return torch.from_numpy(positions.astype(np.int64)).to(self._device)

    def _suppressed(self, built: BuiltBatch) -> tuple[Tensor, Tensor] | None:
        """Return (row of the logits, token id) pairs of stop tokens that come too early."""
        rows: list[int] = []
        token_ids: list[int] = []
        for i, row in enumerate(built.sampled_rows):
            first, stops = self._may_stop_from.get(row, (0, []))
            if built.sampled_positions[i] < first:
                rows += [i] * len(stops)
                token_ids += stops
        if not rows:
            return None
        pairs = torch.tensor([rows, token_ids]).to(self._device)
        return pairs[0], pairs[1]
