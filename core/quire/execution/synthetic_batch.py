"""Batches that no scheduler made: for checks and measurements of an attention backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from quire.interfaces.attention import AttentionSpec
from quire.interfaces.batch import Batch, GroupBatch


@frozen
class Span:
    """Positions [first, last) of a sequence, which a step computes."""

    sequence: int
    first: int
    last: int

    @property
    def num_tokens(self) -> int:
        """Return how many positions there are."""
        return self.last - self.first


def block_tables(lengths: Sequence[int], block_size: int) -> tuple[list[list[int]], int]:
    """Return shuffled block tables for the lengths, and the number of blocks, block 0 included."""
    counts = [-(-n // block_size) for n in lengths]
    generator = torch.Generator().manual_seed(1)
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    return [[order.pop() for _ in range(count)] for count in counts], 1 + sum(counts)


def batch_of(
    spans: Sequence[Span], tables: Sequence[Sequence[int]], spec: AttentionSpec, group: int
) -> Batch:
    """Return the batch that computes the spans, for the group of this number."""
    size, device = spec.block_size, torch.device(spec.device)
    positions = torch.cat([torch.arange(span.first, span.last) for span in spans])
    own = [torch.tensor(tables[span.sequence]) for span in spans]
    slots = [
        table[place // size] * size + place % size
        for table, place in zip(
            own, positions.split([span.num_tokens for span in spans]), strict=True
        )
    ]
    width = max(-(-span.last // size) for span in spans)
    padded = [torch.nn.functional.pad(t[:width], (0, width - len(t[:width]))) for t in own]
    query_lens, seq_lens = [span.num_tokens for span in spans], [span.last for span in spans]

    def ints(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32).to(device)

    tensors = GroupBatch(block_table=ints(torch.stack(padded)), slot_mapping=ints(torch.cat(slots)))
    ends = torch.tensor(query_lens).cumsum(0)
    return Batch(
        token_ids=ints([0] * len(positions)),
        positions=ints(positions),
        cu_seqlens_q=ints([0, *ends.tolist()]),
        seq_lens=ints(seq_lens),
        logit_rows=ints(ends - 1),
        rows=ints(range(len(spans))),
        groups=(tensors,) * (group + 1),
        query_lens=query_lens,
        seq_lens_bound=seq_lens,
        num_single_token_seqs=query_lens.count(1),
        padded_to=len(spans),
    )
