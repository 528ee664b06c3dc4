"""A step of one token a sequence in memory that keeps its addresses, as a CUDA graph has it.

On a GPU the step is captured and replayed. On a CPU a replay is played: device part, write and
attend run again with the plan of the capture, since a graph would know no other.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from quire.interfaces.attention import GraphSupport
from quire.interfaces.batch import Batch, GroupBatch
from quire.testing.attention_cases import (
    Case,
    Inputs,
    make_batch,
    make_layer,
    make_tables,
    step_tensors,
)
from quire.testing.attention_run import Subject, make_cache, write_past
from quire.testing.attention_surroundings import decoys, group_of


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Return what replays a step on a GPU, and plays it again on a CPU; it returns what it did."""
    out = step()
    if device.type != "cuda":
        return step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class GraphStep:
    """The memory of a captured step of the case's sequences and padding rows.

    `load` puts lengths into it, `replay` returns the outputs of all rows.
    """

    def __init__(self, subject: Subject, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs
        self.backend = subject.make(case)
        self._cache = make_cache(subject.backend, case)
        self._layer = make_layer(case, inputs)
        self.num_rows = len(case.lengths) + case.padding
        tensors = step_tensors(case, inputs)
        # Padding rows come from a token too: q, k and v of theirs are finite, and not zero.
        self._q, self._k, self._v = (self._padded(x) for x in tensors)
        shape = (self.num_rows, case.spec.num_heads, case.spec.value_head_dim)
        self._out = self._q.new_full(shape, float("nan"))
        self.batch = self._empty_batch()
        # Shorter lengths see earlier windows: the whole past is there.
        whole = attrs.evolve(case, spec=attrs.evolve(case.spec, sliding_window=None))
        write_past(self.backend, whole, inputs, self._cache)
        self.replay = self._captured()

    def _padded(self, x: Tensor) -> Tensor:
        more = self.num_rows - len(x)
        return torch.cat((x, x.new_ones(more, *x.shape[1:]))) if more else x

    def _empty_batch(self) -> Batch:
        """Return a batch of padding alone, which is what is captured."""
        device, num_rows = self.case.spec.device, self.num_rows
        tables, _ = make_tables(self.case)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        width = max(len(table) for table in tables) + 1
        table = zeros(num_rows, width + self.case.spare_columns)
        group = GroupBatch(block_table=table, slot_mapping=zeros(num_rows))
        return Batch(
            token_ids=zeros(num_rows),
            positions=zeros(num_rows),
            cu_seqlens_q=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
            seq_lens=zeros(num_rows),
            logit_rows=torch.arange(num_rows, dtype=torch.int32, device=device),
            rows=zeros(num_rows),
            groups=(*decoys(self.case, group), group),
            query_lens=[],
            seq_lens_bound=[],
            num_single_token_seqs=0,
            padded_to=num_rows,
            captured_for=GraphSupport.SINGLE_TOKEN,
        )

    def _captured(self) -> Callable[[], Tensor]:
        plan = self.backend.plan(self.batch, group_of(self.batch))

        def step() -> Tensor:
            self._out.fill_(float("nan"))
            self.backend.prepare(plan)
            self.backend.write(self._layer, self._k, self._v, self._cache, plan)
            self.backend.attend(
                self._layer, self._q, self._k, self._v, self._cache, plan, self._out
            )
            return self._out

        return captured(step, self._cache.device)

    def load(self, lengths: list[int]) -> Case:
        """Put a step into the memory: the case's sequences, cut to `lengths`; return its case.

        The keys and values of what is cut off are still in the cache, where nobody may read them.
        """
        cut = attrs.evolve(self.case, lengths=tuple((1, length) for length in lengths))
        size, device = self.case.spec.block_size, self.case.spec.device
        tables, _ = make_tables(self.case)
        spans = [(length - 1, length) for length in lengths]
        step = make_batch(spans, tables, size, device=device)
        group, num_seqs = self.batch.groups[-1], len(lengths)
        width = step.groups[0].block_table.shape[1]
        group.block_table.zero_()
        group.block_table[:num_seqs, :width] = step.groups[0].block_table
        group.slot_mapping[:num_seqs] = step.groups[0].slot_mapping
        self.batch.positions[:num_seqs] = step.positions
        self.batch.seq_lens[:num_seqs] = step.seq_lens
        tokens = [
            torch.stack([x[n - 1] for x, n in zip(all_tokens, lengths, strict=True)])
            for all_tokens in (self.inputs.k, self.inputs.v)
        ]
        self._k[:num_seqs], self._v[:num_seqs] = (x.to(device) for x in tokens)
        # Every step is planned; a graph keeps the plan of its capture.
        self.batch.query_lens, self.batch.seq_lens_bound = [1] * num_seqs, list(lengths)
        self.batch.num_single_token_seqs = num_seqs
        self.backend.plan(self.batch, group_of(self.batch))
        return cut

    def inputs_of(self, cut: Case) -> Inputs:
        """Return the inputs of what `load` returned."""
        lengths = [seq_len for _, seq_len in cut.lengths]
        k = [k[:n] for k, n in zip(self.inputs.k, lengths, strict=True)]
        v = [v[:n] for v, n in zip(self.inputs.v, lengths, strict=True)]
        return attrs.evolve(self.inputs, k=k, v=v)


def graph_steps_of(case: Case) -> list[list[int]]:
    """Return the lengths that a graph is replayed with: the case's, then shorter ones."""
    lengths = [seq_len for _, seq_len in case.lengths]
    return [lengths, [max(1, length // 2) for length in lengths]]
