"""Index arithmetic on the host: which blocks a step's sequences have, and how much memory.

The library calls a block a page. It reads sequences as pieces of one list of blocks:

    pages       | 7 3 9 | 4 | 2 8 |       of sequences 0, 1, 2
    kv_starts   0       3   4     6
"""

from __future__ import annotations

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from quire.interfaces.attention import AttentionSpec, BatchLimits

Ints = NDArray[np.int32]

# Thread blocks an SM for which the library cuts keys into pieces.
PROGRAMS_AN_SM = 2
# (token, head) rows of the library's tiles: the smallest, and those of long queries.
LEAST_TILE = 16
LARGEST_TILE = 128
# The FA3 kernels share one list of tiles among heads where there are more than this.
MOST_TILES_A_HEAD = 4096
FA3_LISTS = 8
# For the starts of lists, and for lists of a fixed length.
SLACK_BYTES = 1 << 16


@frozen(kw_only=True)
class PageLists:
    """What the library wants to know of the sequences of a step, all int32.

    `query_starts`, `kv_starts` [num_rows + 1]: where a sequence's tokens and pages begin.
    `last_lens` [num_rows]: tokens in its last page, 0 where it has none.
    `seq_lens` [num_rows].
    `sources` [num_pages]: where each page's block id is in the flat block table.
    """

    query_starts: Ints
    kv_starts: Ints
    last_lens: Ints
    seq_lens: Ints
    sources: Ints


def page_lists(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    block_size: int,
    first_row: int,
    num_rows: int,
    table_stride: int,
) -> PageLists:
    """Return the lists of sequences that have their block ids from row `first_row` on.

    Rows after those of either list, up to `num_rows`, have no tokens, or no pages.
    """
    lengths = _padded(seq_lens, num_rows)
    counts = -(-lengths // block_size)
    kv_starts = _starts(counts)
    rows = np.repeat(np.arange(first_row, first_row + num_rows), counts)
    within = np.arange(kv_starts[-1]) - np.repeat(kv_starts[:-1], counts)
    return PageLists(
        query_starts=_starts(_padded(query_lens, num_rows)).astype(np.int32),
        kv_starts=kv_starts.astype(np.int32),
        last_lens=(lengths - np.maximum(counts - 1, 0) * block_size).astype(np.int32),
        seq_lens=lengths.astype(np.int32),
        sources=(rows * table_stride + within).astype(np.int32),
    )


def _padded(values: list[int], num_rows: int) -> NDArray[np.int64]:
    found = np.zeros(num_rows, np.int64)
    found[: len(values)] = values
    return found


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    found = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=found[1:])
    return found


def most_pages(spec: AttentionSpec, limits: BatchLimits) -> int:
    """Return the most pages that the sequences of a step have together."""
    return limits.max_num_seqs * -(-limits.max_model_len // spec.block_size)


def partial_bytes(spec: AttentionSpec, limits: BatchLimits, num_sms: int) -> int:
    """Return the bytes of partial results, float32, of keys that are cut into pieces.

    Of a captured step there is room for all its tiles, cut or not; of another one only where its
    keys are cut, and then it has no more tiles than programs run at once.
    """
    group = spec.num_heads // spec.num_kv_heads
    programs = PROGRAMS_AN_SM * num_sms // spec.num_kv_heads
    tile = LEAST_TILE if group <= LEAST_TILE else 64 if group <= 64 else LARGEST_TILE
    captured = -(-limits.max_num_seqs * group // tile) + limits.max_num_seqs - 1
    rows = max(max(programs, captured) * tile, programs * LARGEST_TILE)
    return rows * spec.num_heads * (spec.value_head_dim + 1) * 4 + SLACK_BYTES


def schedule_bytes(spec: AttentionSpec, limits: BatchLimits, num_sms: int) -> int:
    """Return the bytes of the lists of work, int32, that the library plans for one step.

    The FA2 kernels have lists of tiles of at least 16 rows, the FA3 kernels of tiles of 128
    tokens for each head.
    """
    group = spec.num_heads // spec.num_kv_heads
    tokens, seqs = limits.max_num_batched_tokens, limits.max_num_seqs
    programs = PROGRAMS_AN_SM * num_sms // spec.num_kv_heads
    tiles = max(-(-tokens * group // LEAST_TILE) + seqs, programs)
    a_head = -(-tokens // LARGEST_TILE) + seqs
    works = a_head if a_head > MOST_TILES_A_HEAD else a_head * spec.num_heads
    # Three lists of tiles and one byte a tile; where the tokens' and the sequences' pieces begin.
    fa2 = 13 * tiles + 4 * (tokens + seqs)
    return max(fa2, 4 * FA3_LISTS * works) + SLACK_BYTES
