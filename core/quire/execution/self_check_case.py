"""A small case of a model's own spec: steps of ragged sequences on shuffled blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from quire.interfaces.attention import AttentionSpec, BatchLimits
from quire.interfaces.batch import Batch, GroupBatch

# Beyond it a window is not reached: the case would take longer than a start should.
LONGEST_WINDOW = 4096


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


def steps_of(spec: AttentionSpec, limits: BatchLimits) -> list[list[Span]]:
    """Return the case's steps: single tokens with chunks, single tokens, one of each kind.

    Lengths lie around the edges of blocks and of the window; what limits forbid is cut.
    """
    edge = min(spec.block_size, 32)
    lengths = [(1, 1), (1, edge), (1, edge + 1), (1, 3 * edge + 7), (19, 19), (24, 2 * edge + 27)]
    if windowed_sequence(spec) is not None:
        assert spec.sliding_window is not None, "it has one"
        lengths.append((3, spec.sliding_window + 3))
    most = limits.max_model_len
    lengths = [(query_len, min(length, most)) for query_len, length in lengths]
    first = [Span(i, max(0, n - query_len), n) for i, (query_len, n) in enumerate(lengths)]
    second = [Span(i, n, n + 1) for i, (_, n) in enumerate(lengths)]
    third = [Span(1, lengths[1][1] + 1, lengths[1][1] + 2)]
    third.append(Span(3, lengths[3][1] + 1, lengths[3][1] + 4))
    return _allowed([first, second, third], limits)


def fused_steps_of(limits: BatchLimits) -> list[list[Span]]:
    """Return prompts, and some tokens more of each, for the fused norm, rotation and write."""
    first = [Span(0, 0, 1), Span(1, 0, 19), Span(2, 0, 24)]
    second = [Span(0, 1, 2), Span(1, 19, 20), Span(2, 24, 27)]
    return _allowed([first, second], limits)


def _allowed(steps: Sequence[Sequence[Span]], limits: BatchLimits) -> list[list[Span]]:
    most = limits.max_model_len
    short = [[span for span in step if span.last <= most] for step in steps]
    return [batch for step in short for batch in within(step, limits)]


def lengths_of(steps: Sequence[Sequence[Span]]) -> list[int]:
    """Return how long each sequence becomes."""
    spans = [span for step in steps for span in step]
    found = [0] * (1 + max(span.sequence for span in spans))
    for span in spans:
        found[span.sequence] = max(found[span.sequence], span.last)
    return found


def windowed_sequence(spec: AttentionSpec) -> int | None:
    """Return the number of the sequence that is longer than the window, None where none is."""
    window = spec.sliding_window
    return None if window is None or window > LONGEST_WINDOW else 6


def within(spans: Sequence[Span], limits: BatchLimits) -> list[list[Span]]:
    """Return batches of the spans that keep the limits, single tokens first in each."""
    most = limits.max_num_batched_tokens
    batches: list[list[Span]] = [[]]
    for span in sorted(spans, key=lambda span: span.num_tokens > 1):
        span = Span(span.sequence, max(span.first, span.last - most), span.last)
        taken = sum(other.num_tokens for other in batches[-1])
        if taken + span.num_tokens > most or len(batches[-1]) == limits.max_num_seqs:
            batches.append([])
        batches[-1].append(span)
    return [sorted(batch, key=lambda span: span.num_tokens > 1) for batch in batches if batch]


def pieces_of(spans: Sequence[Span], limits: BatchLimits) -> list[list[Span]]:
    """Return batches that compute all tokens of the spans, cut as the limits ask."""
    most = limits.max_num_batched_tokens
    cut = [
        Span(span.sequence, first, min(first + most, span.last))
        for span in spans
        for first in range(span.first, span.last, most)
    ]
    return within(cut, limits)


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
