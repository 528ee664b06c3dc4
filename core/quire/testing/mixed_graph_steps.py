"""A step of any batch in memory that keeps its addresses, as a CUDA graph has it."""

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
    make_layer,
    make_tables,
    step_batch,
    step_tensors,
)
from quire.testing.attention_run import Subject, make_cache, write_past
from quire.testing.attention_surroundings import decoys, group_of
from quire.testing.graph_steps import captured

# Tokens and sequences beyond those of the largest step.
PADDING = 5


class MixedGraphStep:
    """The memory of a captured step that is at least as large as the case's.

    `load` puts a part of the case's sequences into it, `replay` returns the outputs of all tokens.
    On a CPU a replay is played: device part, write and attend run again with the first plan.
    """

    def __init__(self, subject: Subject, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs
        self.backend = subject.make(case)
        self._layer = make_layer(case, inputs)
        self._cache = make_cache(subject.backend, case)
        self.num_tokens = sum(query_len for query_len, _ in case.lengths) + PADDING
        tensors = step_tensors(case, inputs)
        # Tokens that pad have finite numbers, and not zeros.
        shapes = [(self.num_tokens, *x.shape[1:]) for x in tensors]
        self._q, self._k, self._v = (
            x.new_ones(shape) for x, shape in zip(tensors, shapes, strict=True)
        )
        shape = (self.num_tokens, case.spec.num_heads, case.spec.value_head_dim)
        self._out = self._q.new_full(shape, float("nan"))
        self.batch = self._empty_batch()
        write_past(self.backend, case, inputs, self._cache)
        self.replay = self._captured()

    def _empty_batch(self) -> Batch:
        """Return a batch of padding alone, which is what is captured."""
        device, num_seqs = self.case.spec.device, len(self.case.lengths) + PADDING
        tables, _ = make_tables(self.case)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        width = max(len(table) for table in tables) + 1
        table = zeros(num_seqs, width + self.case.spare_columns)
        group = GroupBatch(block_table=table, slot_mapping=zeros(self.num_tokens))
        return Batch(
            token_ids=zeros(self.num_tokens),
            positions=zeros(self.num_tokens),
            cu_seqlens_q=zeros(num_seqs + 1),
            seq_lens=zeros(num_seqs),
            logit_rows=zeros(1),
            rows=zeros(num_seqs),
            groups=(*decoys(self.case, group), group),
            query_lens=[],
            seq_lens_bound=[],
            num_single_token_seqs=0,
            padded_to=num_seqs,
            captured_for=GraphSupport.ANY,
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

    def load(self, chosen: list[int]) -> tuple[Case, Inputs]:
        """Put a step of these sequences of the case into the memory; return its case and inputs."""
        case = attrs.evolve(self.case, lengths=tuple(self.case.lengths[i] for i in chosen))
        given = self.inputs
        q, k, v = ([tensors[i] for i in chosen] for tensors in (given.q, given.k, given.v))
        whole, everyone = step_batch(self.case), step_tensors(self.case, self.inputs)
        starts = whole.cu_seqlens_q.tolist()
        tokens = [t for i in chosen for t in range(starts[i], starts[i + 1])]
        count, num_seqs = len(tokens), len(chosen)
        for memory, values in zip((self._q, self._k, self._v), everyone, strict=True):
            memory.fill_(1)
            memory[:count] = values[tokens]
        group, table = self.batch.groups[-1], whole.groups[0].block_table
        for memory in (group.block_table, group.slot_mapping, self.batch.seq_lens):
            memory.zero_()
        group.block_table[:num_seqs, : table.shape[1]] = table[chosen]
        group.slot_mapping[:count] = whole.groups[0].slot_mapping[tokens]
        self.batch.positions[:count] = whole.positions[tokens]
        self.batch.seq_lens[:num_seqs] = whole.seq_lens[chosen]
        lens = [whole.query_lens[i] for i in chosen]
        self.batch.cu_seqlens_q.fill_(count)
        self.batch.cu_seqlens_q[: num_seqs + 1] = torch.tensor([0, *lens]).cumsum(0)
        self.batch.query_lens = lens
        self.batch.seq_lens_bound = [whole.seq_lens_bound[i] for i in chosen]
        self.batch.num_single_token_seqs = lens.count(1)
        self.backend.plan(self.batch, group_of(self.batch))
        return case, attrs.evolve(given, q=q, k=k, v=v)
