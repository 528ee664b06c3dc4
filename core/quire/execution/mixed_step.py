"""A step of any number of tokens a sequence whose inputs keep their addresses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.execution.block_tables import Ints
from quire.execution.static_step import Ending, Loaded, StaticStep, StepTools
from quire.interfaces.attention import GraphSupport
from quire.interfaces.batch import Batch, GroupBatch
from quire.scheduling.output import SchedulerOutput


class MixedStep(StaticStep):
    """Steps in which a sequence has several tokens; a size is a number of tokens.

    The columns, with P tokens, S sequences and R sampled ones:

        a token     id, position, row to read the id from (-1: none), slot of each group   [P] each
        a sequence  begin [S + 1], length [S], row [S]
        a sample    its token's place, its row, the new token's position                   [R] each

    Padding tokens belong to no sequence and write to block 0; padding sequences have no tokens;
    padding samples are sampled for nobody. S is the same for all sizes.
    """

    def __init__(self, tools: StepTools, max_num_tokens: int) -> None:
        self._num_seqs = tools.max_num_seqs
        columns = 3 + tools.builder.num_groups
        super().__init__(tools, columns * max_num_tokens + 6 * tools.max_num_seqs + 1)
        self._token_ids = torch.zeros(max_num_tokens, dtype=torch.int32, device=self._inputs.device)

    def _widths(self, size: int) -> list[int]:
        """Return how long each column is."""
        groups = self._builder.num_groups
        # Below the tokens in number, as `Batch.rows_to_keep` tells some of them from all; a step
        # with several tokens of a sequence samples fewer than it has.
        samples = min(self._num_seqs, size - 1)
        seqs = self._num_seqs
        return [size] * (3 + groups) + [seqs + 1, seqs, seqs] + [samples] * 3

    def _padding(self, num_tokens: int) -> list[int]:
        """Return what pads each column."""
        row, groups = self._builder.padding_row, self._builder.num_groups
        return [0, 0, -1, *[0] * groups, num_tokens, 0, row, 0, row, 0]

    def begin(self, output: SchedulerOutput, size: int) -> Loaded:
        """Count the step's tokens and enqueue the upload of its inputs, padded to `size`."""
        builder = self._builder
        step = builder.count(output)
        columns = [*step.tokens, step.cu_seqlens, step.seq_lens, step.rows]
        columns += [step.logit_rows, step.rows[step.sampled], step.seq_lens[step.sampled]]
        padded = self._padded(columns, size, output.num_tokens)
        slot = output.step_id % builder.num_buffers
        self._upload(padded, [], slot)
        host_rows = step.rows[step.sampled].tolist()
        self._sampled.take(self._samples(size)[0], host_rows)
        return Loaded(
            ids=[step.ids[i] for i in step.sampled],
            rows=host_rows,
            positions=step.seq_lens[step.sampled],
            query_lens=step.query_lens.tolist(),
            seq_lens=step.seq_lens.tolist(),
            slot=slot,
        )

    def _padded(self, columns: list[Ints], size: int, num_tokens: int) -> list[Ints]:
        """Return each column followed by what pads it."""
        fill = zip(self._widths(size), self._padding(num_tokens), strict=True)
        return [
            part
            for column, (width, value) in zip(columns, fill, strict=True)
            for part in (column, np.full(width - len(column), value, np.int32))
        ]

    def begin_padding(self, size: int) -> None:
        """Enqueue inputs of padding alone, to warm up with and to capture."""
        nothing = np.zeros(0, np.int32)
        columns = self._padded([nothing] * len(self._widths(size)), size, 0)
        values = torch.from_numpy(np.concatenate(columns))
        self._inputs[: len(values)].copy_(values)
        self._sampled.take(self._samples(size)[0], [])

    def _samples(self, size: int) -> tuple[Tensor, Tensor]:
        """Return rows and positions of what a step samples."""
        widths = self._widths(size)
        views = self._inputs[: sum(widths)].split(widths)
        return views[-2], views[-1]

    def batch(self, size: int) -> Batch:
        """Return the batch of a size; its tensors are always at the same place."""
        widths = self._widths(size)
        first_slots, first_seqs = 3, 3 + self._builder.num_groups
        views = self._inputs[: sum(widths)].split(widths)
        cu_seqlens, seq_lens, rows = views[first_seqs : first_seqs + 3]
        return Batch(
            token_ids=self._token_ids[:size],
            positions=views[1],
            cu_seqlens_q=cu_seqlens,
            seq_lens=seq_lens,
            logit_rows=views[first_seqs + 3],
            rows=rows,
            groups=tuple(
                GroupBatch(block_table=table, slot_mapping=views[first_slots + group])
                for group, table in enumerate(self._tables)
            ),
            query_lens=[],
            seq_lens_bound=[],
            num_single_token_seqs=0,
            padded_to=self._num_seqs,
            captured_for=GraphSupport.ANY,
        )

    def run(self, batch: Batch, ending: Ending) -> Tensor:
        """Enqueue the step; return logits, or int32 [2, R]: the tokens and their status."""
        size = batch.token_ids.shape[0]
        widths = self._widths(size)
        views = self._inputs[: sum(widths)].split(widths)
        known, sources = views[0], views[2]
        sampled = self._builder.last_tokens.index_select(0, sources.clamp(min=0))
        torch.where(sources >= 0, sampled, known, out=batch.token_ids)
        return self._ended(self._logits_of(batch), *self._samples(size), ending)

    def sampled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return rows and positions of what a step samples, padding included."""
        return self._samples(batch.token_ids.shape[0])
