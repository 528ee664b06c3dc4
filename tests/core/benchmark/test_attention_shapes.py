"""Shapes are read as they are written, and count what a step reads and computes."""

from __future__ import annotations

import pytest

from quire.benchmark.attention_shapes import (
    DEFAULTS,
    DRAWN,
    Shape,
    seen_keys,
    seen_pairs,
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("decode:7", [(1, 7)]),
        ("decode:2x7", [(1, 7)] * 2),
        ("prefill:5", [(5, 5)]),
        ("prefill:3x5", [(5, 5)] * 3),
        ("chunk:4@9", [(4, 9)]),
        ("chunk:2x4@4", [(4, 4)] * 2),
        ("mixed:4@9+2x7", [(1, 7), (1, 7), (4, 9)]),
        ("mixed:7+1@3+2x2@8", [(1, 7), (1, 3), (2, 8), (2, 8)]),
    ],
)
def test_shape_is_read_with_single_tokens_first(text: str, rows: list[tuple[int, int]]) -> None:
    shape = Shape.parse(text)

    assert list(shape.rows) == rows
    assert shape.num_tokens == sum(query_len for query_len, _ in rows)
    assert shape.longest == max(length for _, length in rows)


@pytest.mark.parametrize(
    "text",
    [
        *("", "decode", "decode:", "decode:x", "decode:0", "decode:0x5", "decode:-1", "decode:2x"),
        *("decode:1.5", "decode:3@5", "prefill:3@5", "chunk:5", "chunk:6@5", "chunk:0@5"),
        *("mixed:", "mixed:3+", "mixed:3+6@5", "decode:3+4", "other:5", "decode:5 x 5"),
    ],
)
def test_misspelt_shape_is_refused_saying_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: decode:BxL") as caught:
        Shape.parse(text)

    assert str(caught.value).startswith(repr(text))


@pytest.mark.parametrize("text", ["decode:99999999", "decode:9999x9999", "mixed:9000000+9000000"])
def test_shape_beyond_any_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="more than 16777216 tokens in all; take fewer"):
        Shape.parse(text)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("text", ["decode:1x9", "prefill:12", "chunk:5@20", "mixed:2x7+3@9"])
def test_work_is_counted_as_a_mask_counts_it(text: str, window: int | None) -> None:
    rows, pairs, keys = Shape.parse(text).rows, 0, 0
    for query_len, length in rows:
        seen = [
            (query, key)
            for query in range(length - query_len, length)
            for key in range(length)
            if key <= query and query - key < (window or length)
        ]
        pairs += len(seen)
        keys += len({key for _, key in seen})

    assert seen_pairs(rows, window) == pairs
    assert seen_keys(rows, window) == keys


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_own_shapes_can_be_read(device: str) -> None:
    assert [Shape.parse(text).kind for text in DRAWN[device]] == ["decode"] * len(DRAWN[device])
    assert {Shape.parse(text).kind for text in DEFAULTS[device]} == {
        *("decode", "prefill", "chunk", "mixed"),
    }
