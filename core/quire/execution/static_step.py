"""What steps have in common whose inputs keep their addresses, so that they can be captured."""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from attrs import define, frozen
from torch import Tensor

from quire.execution.batch_builder import BatchBuilder
from quire.execution.block_tables import Ints
from quire.execution.sampling_rows import SamplingRows
from quire.execution.staging import to_device
from quire.interfaces.attention import AttentionBackend
from quire.interfaces.batch import Batch
from quire.interfaces.model import Model
from quire.interfaces.sampling import Sampler, SamplingBatch
from quire.scheduling.output import SchedulerOutput


class Ending(enum.Enum):
    """What a captured step ends with: logits, or tokens that were sampled in it."""

    LOGITS = "logits"
    GREEDY = "greedy"
    RANDOM = "random"
    FILTERED = "filtered"


def ending_for(flags: dict[str, bool]) -> Ending:
    """Return how to sample rows with these flags of `SamplingRows.flags`."""
    if flags["all_greedy"]:
        return Ending.GREEDY
    filtered = flags["any_top_k"] or flags["any_top_p"] or flags["any_min_p"]
    return Ending.FILTERED if filtered else Ending.RANDOM


@define(kw_only=True)
class Loaded:
    """A step on the host: tokens and length of each sequence, and which of them are sampled.

    `ids`, `rows` and `positions` (of the new token) are those of the sampled ones.
    """

    ids: list[int]
    rows: list[int]
    positions: Ints
    query_lens: list[int]
    seq_lens: list[int]
    slot: int


@frozen(kw_only=True)
class StepTools:
    """What a step is made with; `max_num_seqs` rows it may have.

    `forbid` sets to -inf what the masks that were sent last forbid, in place.
    """

    model: Model
    backends: Sequence[AttentionBackend]
    builder: BatchBuilder
    sampling: SamplingRows
    sampler: Sampler
    forbid: Callable[[Tensor], Tensor]
    max_num_seqs: int


class SampledRows:
    """Parameters of the rows that a step samples, where captured steps read them."""

    def __init__(self, sampling: SamplingRows, most: int) -> None:
        self._sampling = sampling
        self._reals, self._whole, self.rows = sampling.empty_columns(most)
        self._holds: tuple[int, list[int]] | None = None

    def take(self, rows: Tensor, host_rows: list[int]) -> None:
        """Enqueue the parameters of `rows`, int32 on the device, unless they are here already.

        `host_rows` are the first of them; behind them comes padding.
        """
        key = (self._sampling.version, [len(rows), *host_rows])
        if key == self._holds:
            return
        self._holds = key
        reals, whole = self._sampling.columns(rows)
        self._reals[:, : len(rows)] = reals
        self._whole[:, : len(rows)] = whole
        self.rows[: len(rows)] = rows

    def batch(self, rows: Tensor, position: Tensor, **flags: Any) -> SamplingBatch:
        """Return what is here of so many rows."""
        count = len(rows)
        columns = self._reals[:, :count], self._whole[:, :count]
        return self._sampling.as_batch(*columns, rows, position, **flags)


class StaticStep(abc.ABC):
    """The inputs of steps of one kind, for any size up to a largest, and their run."""

    def __init__(self, tools: StepTools, num_inputs: int) -> None:
        self._tools = tools
        self._builder = tools.builder
        device = tools.builder.device
        # The columns of one step end to end, for whatever size it has; behind them what changed.
        self._most_changes = 64 * tools.max_num_seqs + 16384
        size = num_inputs + self._most_changes
        self._inputs = torch.zeros(size, dtype=torch.int32, device=device)
        everyone = torch.full((tools.max_num_seqs,), tools.builder.padding_row, device=device)
        groups = range(tools.builder.num_groups)
        self._tables = [tools.builder.tables.gather(g, everyone.int()) for g in groups]
        self._logits: Tensor | None = None
        # The parameters and rows of what is sampled; mostly those of the step before.
        self._sampled = SampledRows(tools.sampling, tools.max_num_seqs)

    @abc.abstractmethod
    def begin(self, output: SchedulerOutput, size: int) -> Loaded:
        """Count the step's tokens and enqueue the upload of its inputs, padded to `size`."""

    @abc.abstractmethod
    def begin_padding(self, size: int) -> None:
        """Enqueue inputs of padding alone, to warm up with and to capture."""

    @abc.abstractmethod
    def batch(self, size: int) -> Batch:
        """Return the batch of a size; its tensors are always at the same place."""

    @abc.abstractmethod
    def run(self, batch: Batch, ending: Ending) -> Tensor:
        """Enqueue the step; return logits, or int32 [2, rows]: the tokens and their status."""

    @abc.abstractmethod
    def sampled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return rows and positions of what a step samples, padding included."""

    def end(self, batch: Batch, ending: Ending) -> Tensor:
        """Enqueue the end of a step that was run for its logits: sample what masks leave."""
        assert self._logits is not None, "the step was run for its logits"
        rows, positions = self.sampled(batch)
        return self._ended(self._tools.forbid(self._logits[: len(rows)]), rows, positions, ending)

    def plan(self, batch: Batch, loaded: Loaded | None) -> None:
        """Let the backends plan for what the inputs hold now: `loaded`, or padding alone."""
        batch.query_lens = [] if loaded is None else loaded.query_lens
        batch.seq_lens_bound = [] if loaded is None else loaded.seq_lens
        batch.num_single_token_seqs = batch.query_lens.count(1)
        batch.in_flight_slot = 0 if loaded is None else loaded.slot
        batch.plans = [backend.plan(batch, i) for i, backend in enumerate(self._tools.backends)]

    def _upload(self, columns: Sequence[Ints], extra: Sequence[Ints], slot: int) -> list[Tensor]:
        """Send the columns to their fixed place, and tell the tables; return what `extra` became.

        Changes of the tables and `extra` go behind the columns, in the same copy where they fit.
        """
        tables = self._builder.tables
        changes = tables.take_changes()
        parts = [part for _, places, ids in changes for part in (places, ids)]
        parts += extra
        staging = self._builder.staging
        if sum(map(len, parts)) <= self._most_changes:
            views = staging.upload([*columns, *parts], slot, self._inputs)
            views = views[sum(map(len, columns)) :]
        else:  # long tables came from the prefix cache
            views = to_device(np.concatenate(parts), torch.int32, str(self._inputs.device))
            staging.upload(columns, slot, self._inputs)
        pieces = views.split([len(part) for part in parts])
        for i, (group, _, _) in enumerate(changes):
            tables.tell_device(group, pieces[2 * i], pieces[2 * i + 1])
        self._tools.sampling.tell_device()
        return list(pieces[2 * len(changes) :])

    def _logits_of(self, batch: Batch) -> Tensor:
        """Enqueue what comes before sampling: tables, the backends' part, and the model."""
        tools = self._tools
        for number, group in enumerate(batch.groups):
            self._builder.tables.gather(number, batch.rows, out=group.block_table)
        for backend, plan in zip(tools.backends, batch.plans, strict=True):
            backend.prepare(plan)
        hidden = tools.model(tools.model.embed(batch.token_ids), batch)
        return tools.model.logits(batch.kept(hidden))

    def _keep(self, logits: Tensor) -> Tensor:
        """Copy logits to memory of their own: that of a graph is used again by other graphs."""
        if self._logits is None:
            shape = (self._tools.max_num_seqs, logits.shape[1])
            self._logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
        return self._logits[: logits.shape[0]].copy_(logits)

    def _ended(self, logits: Tensor, rows: Tensor, positions: Tensor, ending: Ending) -> Tensor:
        """End the step: sample the logits of these rows for these positions, or keep them."""
        if ending is Ending.LOGITS:
            return self._keep(logits)
        filtered = ending is Ending.FILTERED
        params = self._sampled.batch(
            rows,
            positions.long(),
            all_greedy=ending is Ending.GREEDY,
            any_greedy=True,
            any_top_k=filtered,
            any_top_p=filtered,
            any_min_p=filtered,
        )
        sampled = self._tools.sampler.sample(logits, params)
        token_ids = sampled.token_ids[:, 0].int()
        last = self._tools.model.config.vocab_size - 1
        places = self._sampled.rows[: len(rows)]
        self._builder.last_tokens.index_copy_(0, places, token_ids.clamp(0, last))
        return torch.stack((token_ids, sampled.status.int()))
