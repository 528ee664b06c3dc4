"""A step of one token a sequence whose inputs keep their addresses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.execution.static_step import Ending, Loaded, StaticStep, StepTools
from quire.interfaces.attention import GraphSupport
from quire.interfaces.batch import Batch, GroupBatch
from quire.scheduling.output import SchedulerOutput


class DecodeStep(StaticStep):
    """Steps in which each sequence has one token; a size is a number of sequences.

    Rows that pad a size have length 0 and write to block 0.
    """

    def __init__(self, tools: StepTools) -> None:
        self._num_columns = 3 + tools.builder.num_groups
        super().__init__(tools, self._num_columns * tools.max_num_seqs)
        device = self._inputs.device
        self._range = torch.arange(tools.max_num_seqs + 1, dtype=torch.int32, device=device)
        self._token_ids = torch.zeros(tools.max_num_seqs, dtype=torch.int32, device=device)

    def begin(self, output: SchedulerOutput, size: int) -> Loaded:
        """Count the step's tokens and enqueue the upload of its inputs, padded to `size`."""
        builder = self._builder
        rows = builder.rows_of(output)
        positions, known_rows, known_tokens = builder.advance(rows)
        slots = [builder.tables.slots(g, rows, positions) for g in range(builder.num_groups)]
        lengths = positions + np.int32(1)
        missing = size - len(rows)
        columns = [positions, lengths, rows, *slots]
        if missing:
            columns = [
                np.concatenate((column, np.full(missing, value, np.int32)))
                for column, value in zip(columns, self._padding, strict=True)
            ]
        slot = output.step_id % builder.num_buffers
        device_rows, tokens = self._upload(columns, [known_rows, known_tokens], slot)
        if len(known_rows):
            builder.last_tokens.index_copy_(0, device_rows.long(), tokens)
        host_rows = rows.tolist()
        self._sampled.take(self._rows(size), host_rows)
        return Loaded(
            ids=list(output.num_scheduled_tokens),
            rows=host_rows,
            positions=lengths,
            query_lens=[1] * len(rows),
            seq_lens=lengths.tolist(),
            slot=slot,
        )

    @property
    def _padding(self) -> list[int]:
        """What pads each column."""
        return [0, 0, self._builder.padding_row, *[0] * self._builder.num_groups]

    def begin_padding(self, size: int) -> None:
        """Enqueue inputs of padding alone, to warm up with and to capture."""
        values = torch.tensor(self._padding, dtype=torch.int32, device=self._inputs.device)
        self._inputs[: len(values) * size] = values.repeat_interleave(size)
        self._sampled.take(self._rows(size), [])

    def _rows(self, size: int) -> Tensor:
        """Return the rows of a step's inputs."""
        return self._inputs[2 * size : 3 * size]

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
            captured_for=GraphSupport.SINGLE_TOKEN,
        )

    def run(self, batch: Batch, ending: Ending) -> Tensor:
        """Enqueue the step; return logits, or int32 [2, size]: the tokens and their status."""
        rows = self._sampled.rows[: len(batch.rows)]
        torch.take(self._builder.last_tokens, rows, out=batch.token_ids)
        return self._ended(self._logits_of(batch), *self.sampled(batch), ending)

    def sampled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return rows and positions of what a step samples, padding included."""
        return batch.rows, batch.seq_lens
