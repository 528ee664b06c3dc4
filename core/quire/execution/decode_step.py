"""A step of one token a sequence whose inputs keep their addresses, so that it can be captured."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
import torch
from attrs import define
from torch import Tensor

from quire.execution.adjustments import to_device
from quire.execution.batch_builder import BatchBuilder
from quire.execution.block_tables import Ints
from quire.execution.sampling_rows import SamplingRows
from quire.interfaces.attention import AttentionBackend
from quire.interfaces.batch import Batch, GroupBatch
from quire.interfaces.model import Model
from quire.interfaces.sampling import Sampler
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
class Decoding:
    """A step's sequences on the host: ids and rows, and the length of each with its new token."""

    ids: list[int]
    rows: list[int]
    lengths: Ints
    slot: int


class DecodeStep:
    """The inputs of such steps, for any number of sequences up to `max_num_seqs`, and their run.

    Rows that pad a size have length 0 and write to block 0.
    """

    def __init__(
        self,
        *,
        model: Model,
        backends: Sequence[AttentionBackend],
        builder: BatchBuilder,
        sampling: SamplingRows,
        sampler: Sampler,
        max_num_seqs: int,
    ) -> None:
        self._model = model
        self._backends = backends
        self._builder = builder
        self._sampling = sampling
        self._sampler = sampler
        self._vocab_size = model.config.vocab_size
        self._max_num_seqs = max_num_seqs
        self._num_columns = 3 + builder.num_groups
        device = builder.device
        # Columns of one step end to end, for whatever size it has; behind them what changed.
        self._most_changes = 64 * max_num_seqs + 16384
        size = self._num_columns * max_num_seqs + self._most_changes
        self._inputs = torch.zeros(size, dtype=torch.int32, device=device)
        self._range = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._token_ids = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        everyone = torch.full_like(self._token_ids, builder.padding_row)
        self._tables = [builder.tables.gather(g, everyone) for g in range(builder.num_groups)]
        self._logits: Tensor | None = None

    def begin(self, output: SchedulerOutput, size: int) -> Decoding:
        """Count the step's tokens and enqueue the upload of its inputs, padded to `size`."""
        builder = self._builder
        rows = builder.rows_of(output)
        positions, known_rows, known_tokens = builder.advance(rows)
        slots = [builder.tables.slots(g, rows, positions) for g in range(builder.num_groups)]
        lengths = positions + np.int32(1)
        missing = size - len(rows)
        columns = [positions, lengths, rows, *slots]
        if missing:
            fill = [0, 0, builder.padding_row, *(0 for _ in slots)]
            columns = [
                np.concatenate((column, np.full(missing, value, np.int32)))
                for column, value in zip(columns, fill, strict=True)
            ]
        slot = output.step_id % builder.num_buffers
        self._upload(columns, known_rows, known_tokens, slot)
        self._sampling.tell_device()
        return Decoding(
            ids=list(output.num_scheduled_tokens), rows=rows.tolist(), lengths=lengths, slot=slot
        )

    def _upload(self, columns: list[Ints], rows: Ints, tokens: Ints, slot: int) -> None:
        """Send the columns to their fixed place, and what changed behind them."""
        tables = self._builder.tables
        changes = tables.take_changes()
        parts = [part for _, places, ids in changes for part in (places, ids)]
        parts += [rows, tokens]
        total = sum(map(len, parts))
        staging = self._builder.staging
        if total <= self._most_changes:
            views = staging.upload([*columns, *parts], slot, self._inputs)
            views = views[sum(map(len, columns)) :]
        else:  # long tables came from the prefix cache
            views = to_device(np.concatenate(parts), torch.int32, str(self._inputs.device))
            staging.upload(columns, slot, self._inputs)
        pieces = views.split([len(part) for part in parts])
        for i, (group, _, _) in enumerate(changes):
            tables.tell_device(group, pieces[2 * i], pieces[2 * i + 1])
        if len(rows):
            self._builder.last_tokens.index_copy_(0, pieces[-2].long(), pieces[-1])

    def begin_padding(self, size: int) -> None:
        """Enqueue inputs of padding alone, to warm up with and to capture."""
        row = self._builder.padding_row
        fill = [0, 0, row, *[0] * self._builder.num_groups]
        values = torch.tensor(fill, dtype=torch.int32, device=self._inputs.device)
        self._inputs[: len(fill) * size] = values.repeat_interleave(size)

    def batch(self, size: int) -> Batch:
        """Return the batch of a size; its tensors are always at the same place."""
        views = self._inputs[: self._num_columns * size].view(self._num_columns, size)
        positions, seq_lens, rows, *slots = views.unbind()
        return Batch(
            token_ids=self._token_ids[:size],
            positions=positions,
            cu_seqlens_q=self._range[: size + 1],
            seq_lens=seq_lens,
            logit_rows=self._range[:size],
            rows=rows,
            groups=tuple(
                GroupBatch(block_table=table[:size], slot_mapping=slot)
                for table, slot in zip(self._tables, slots, strict=True)
            ),
            query_lens=[],
            seq_lens_bound=[],
            num_single_token_seqs=0,
            padded_to=size,
        )

    def plan(self, batch: Batch, decoding: Decoding | None) -> None:
        """Let the backends plan for what the inputs hold now: `decoding`, or padding alone."""
        lengths = [] if decoding is None else decoding.lengths.tolist()
        batch.query_lens, batch.seq_lens_bound = [1] * len(lengths), lengths
        batch.num_single_token_seqs = len(lengths)
        batch.in_flight_slot = 0 if decoding is None else decoding.slot
        batch.plans = [backend.plan(batch, i) for i, backend in enumerate(self._backends)]

    def run(self, batch: Batch, ending: Ending) -> Tensor:
        """Enqueue the step; return logits, or int32 [2, size]: the tokens and their status."""
        builder = self._builder
        torch.index_select(builder.last_tokens, 0, batch.rows, out=batch.token_ids)
        for number, group in enumerate(batch.groups):
            builder.tables.gather(number, batch.rows, out=group.block_table)
        for backend, plan in zip(self._backends, batch.plans, strict=True):
            backend.prepare(plan)
        logits = self._model.logits(self._model(self._model.embed(batch.token_ids), batch))
        if ending is Ending.LOGITS:
            return self._keep(logits)
        return self._sampled(logits, batch, ending)

    def _keep(self, logits: Tensor) -> Tensor:
        """Copy logits to memory of their own: that of a graph is used again by other graphs."""
        if self._logits is None:
            shape = (self._max_num_seqs, logits.shape[1])
            self._logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
        return self._logits[: logits.shape[0]].copy_(logits)

    def _sampled(self, logits: Tensor, batch: Batch, ending: Ending) -> Tensor:
        filtered = ending is Ending.FILTERED
        params = self._sampling.gather(
            batch.rows,
            batch.seq_lens.long(),
            all_greedy=ending is Ending.GREEDY,
            any_greedy=True,
            any_top_k=filtered,
            any_top_p=filtered,
            any_min_p=filtered,
        )
        sampled = self._sampler.sample(logits, params)
        token_ids = sampled.token_ids[:, 0].int()
        self._builder.last_tokens.index_copy_(
            0, batch.rows.long(), token_ids.clamp(0, self._vocab_size - 1)
        )
        return torch.stack((token_ids, sampled.status.int()))
