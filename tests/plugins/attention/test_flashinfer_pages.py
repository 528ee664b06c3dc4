"""Index arithmetic of `flashinfer` on the host, and bounds of memory."""

from __future__ import annotations

import attrs
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quire.testing.attention_cases import LIMITS, make_spec
from quire_attention.flashinfer import pages


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int, int]:
    """Draw (past, length) of sequences, a block size, rows of padding and of other sequences."""
    block_size = draw(st.sampled_from([1, 2, 16, 48]))
    more = st.integers(-1, 1)
    edges = st.builds(lambda n, more: max(1, n * block_size + more), st.integers(0, 4), more)
    lengths = draw(st.lists(st.one_of(edges, st.integers(1, 200)), max_size=6))
    spans = [(draw(st.integers(0, length - 1)), length) for length in lengths]
    least_padding = 0 if spans else 1
    return spans, block_size, draw(st.integers(least_padding, 3)), draw(st.integers(0, 3))


@given(steps())
def test_page_lists_name_the_block_of_every_token(
    step: tuple[list[tuple[int, int]], int, int, int],
) -> None:
    spans, block_size, padding, first_row = step
    num_rows, width = len(spans) + padding, 201
    table = np.random.default_rng(0).permutation((first_row + num_rows) * width)

    lists = pages.page_lists(
        [length - past for past, length in spans],
        [length for _, length in spans],
        block_size=block_size,
        first_row=first_row,
        num_rows=num_rows,
        table_stride=width,
    )

    found = table[lists.sources]
    for i, (past, length) in enumerate(spans):
        begin, end = lists.kv_starts[i : i + 2]
        tokens = np.arange(length)
        blocks = table.reshape(-1, width)[first_row + i, tokens // block_size]
        assert (found[begin:end][tokens // block_size] == blocks).all()
        assert (end - begin - 1) * block_size + lists.last_lens[i] == length == lists.seq_lens[i]
        assert 1 <= lists.last_lens[i] <= block_size
        assert lists.query_starts[i + 1] - lists.query_starts[i] == length - past
    assert set(lists.query_starts[len(spans) :]) == {lists.query_starts[-1]}
    assert set(lists.kv_starts[len(spans) :]) == {len(lists.sources)}
    assert not lists.seq_lens[len(spans) :].any()
    assert not lists.last_lens[len(spans) :].any()
    assert {values.dtype for values in attrs.astuple(lists)} == {np.dtype(np.int32)}


def test_most_pages_are_those_of_the_longest_sequences() -> None:
    spec = make_spec(block_size=48)
    longest = [LIMITS.max_model_len] * LIMITS.max_num_seqs

    lists = pages.page_lists(
        [1] * len(longest),
        longest,
        block_size=48,
        first_row=0,
        num_rows=len(longest),
        table_stride=999,
    )

    assert len(lists.sources) == pages.most_pages(spec, LIMITS)


def test_partial_results_have_room_for_the_tiles_of_every_captured_step() -> None:
    # 132 SMs run 264 programs, 33 for each of 8 KV heads; 256 sequences have 64 + 255 tiles of 16.
    spec = make_spec(num_heads=32, num_kv_heads=8, head_dim=128, value_head_dim=128)
    few = attrs.evolve(LIMITS, max_num_seqs=4)
    many = attrs.evolve(LIMITS, max_num_seqs=256)

    sizes = [pages.partial_bytes(spec, limits, 132) for limits in (few, many)]

    a_row = 32 * 129 * 4
    assert sizes == [33 * 128 * a_row + pages.SLACK_BYTES, 319 * 16 * a_row + pages.SLACK_BYTES]


def test_schedules_of_prompts_have_a_list_for_each_head() -> None:
    spec = make_spec(num_heads=32, num_kv_heads=8)
    limits = attrs.evolve(LIMITS, max_num_seqs=256, max_num_batched_tokens=8192)

    # 64 full tiles, and one more for each sequence.
    assert pages.schedule_bytes(spec, limits, 132) == 4 * 8 * 32 * 320 + pages.SLACK_BYTES
