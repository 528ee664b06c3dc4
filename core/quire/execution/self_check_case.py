"""A small case of a model's own spec: which spans of which sequences each step computes."""

from __future__ import annotations

from collections.abc import Sequence

from quire.execution.synthetic_batch import Span
from quire.interfaces.attention import AttentionSpec, BatchLimits

# Beyond it a window is not reached: the case would take longer than a start should.
LONGEST_WINDOW = 4096


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
    lengths = [(min(n, _longest_query(spec)), min(length, most)) for n, length in lengths]
    first = [Span(i, max(0, n - query_len), n) for i, (query_len, n) in enumerate(lengths)]
    second = [Span(i, n, n + 1) for i, (_, n) in enumerate(lengths)]
    third = [Span(1, lengths[1][1] + 1, lengths[1][1] + 2)]
    third.append(Span(3, lengths[3][1] + 1, lengths[3][1] + 4))
    return _allowed([first, second, third], limits)


def _longest_query(spec: AttentionSpec) -> int:
    """Return how many tokens of a sequence a backend attends to: more latents their layer does."""
    plain_from = None if spec.latent is None else spec.latent.plain_from
    return LONGEST_WINDOW if plain_from is None else plain_from - 1


def whole_steps_of(limits: BatchLimits) -> list[list[Span]]:
    """Return whole sequences, for an encoder."""
    lengths = sorted({min(n, limits.max_model_len) for n in (1, 2, 16, 19, 67)})
    return _allowed([[Span(i, 0, n) for i, n in enumerate(lengths)]], limits)


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
