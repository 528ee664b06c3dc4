"""What kernels tell of their launches, against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire_kernels import costs


def ints(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_product_of_one_row_reads_its_weight() -> None:
    args = {"x_ptr": torch.zeros(1, 8), "weight_ptr": torch.zeros(4, 8), "eps": 1e-6}

    assert costs.of_product(None, None, args) == {"bytes": 40 * 4, "flops": 64}


@pytest.mark.parametrize(("adds", "rows_moved"), [(False, 2), (True, 4)])
def test_norm_moves_its_rows(adds: bool, rows_moved: int) -> None:
    args = {"out_ptr": torch.zeros(3, 8), "weight_ptr": torch.zeros(8), "ADDS": adds}

    assert costs.of_norm(None, None, args)["bytes"] == rows_moved * 3 * 8 * 4 + 8 * 4


CACHES = pytest.mark.parametrize(
    ("stored", "size"), [(torch.bfloat16, 2), (torch.float8_e4m3fn, 1)], ids=["bfloat16", "fp8"]
)


@CACHES
def test_attention_of_single_tokens_reads_the_keys_of_its_items(
    stored: torch.dtype, size: int
) -> None:
    args = {
        **{"SINGLE": True, "NUM_HEADS": 8, "GROUP": 4, "HEAD_DIM": 16, "VALUE_DIM": 16},
        "items_ptr": ints(
            [[0, 0, 64, 2, 0], [0, 64, 100, 2, 1], [1, 0, 7, 1, 2], [9, 9, 99, 9, 9]]
        ),
        "num_items_ptr": ints([3]),
        "q_ptr": torch.zeros(2, 8, 16, dtype=torch.bfloat16),
        "cache_ptr": torch.zeros(1, dtype=stored),
    }

    found = costs.of_attention(None, None, args)

    num_bytes = (107 * 2 * size + 2 * 8 * 2) * 32
    assert found == {"bytes": num_bytes, "flops": 2 * 107 * 8 * 32}


@CACHES
def test_writes_move_keys_and_values_in_the_width_of_the_cache(
    stored: torch.dtype, size: int
) -> None:
    cache = torch.zeros(1, dtype=stored)
    heads = torch.zeros(5, 3, 16, dtype=torch.bfloat16)
    qkv = torch.zeros(5, (4 + 2 * 3) * 16, dtype=torch.bfloat16)
    written = {"k_ptr": heads, "v_ptr": heads, "key_ptr": cache}
    rotated = {"qkv_ptr": qkv, "key_ptr": cache, "NUM_KV_HEADS": 3, "HEAD_DIM": 16}

    assert costs.of_write(None, None, written)["bytes"] == 2 * 5 * 48 * (2 + size)
    assert costs.of_rotation(None, None, rotated)["bytes"] == 5 * 16 * (2 * 10 + 2 * 4 + size * 6)


sequences = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=4)


@given(sequences, st.none() | st.integers(1, 40))
def test_attention_of_tiles_counts_the_pairs_that_are_seen(
    spans: list[tuple[int, int]], window: int | None
) -> None:
    pairs = keys = 0
    for query_len, past in spans:
        seen = [
            set(range(0 if window is None else max(0, t - window + 1), t + 1))
            for t in range(past, past + query_len)
        ]
        pairs += sum(map(len, seen))
        keys += len(set.union(*seen))
    starts = [0]
    for query_len, _ in spans:
        starts.append(starts[-1] + query_len)
    args = {
        **{"SINGLE": False, "NUM_HEADS": 4, "GROUP": 2, "HEAD_DIM": 8, "VALUE_DIM": 8},
        "items_ptr": ints([[len(spans), 0], *([i, 0] for i in range(len(spans))), [77, 0]]),
        "starts_ptr": ints(starts),
        "seq_lens_ptr": ints([query_len + past for query_len, past in spans]),
        "q_ptr": torch.zeros(1, 4, 8),
        "cache_ptr": torch.zeros(1),
        "WINDOW": window,
    }

    found = costs.of_attention(None, None, args)

    assert found["flops"] == 2 * pairs * 4 * 16
    assert found["bytes"] == (keys * 2 + starts[-1] * 4) * 16 * 4


def test_merge_reads_the_parts_of_what_was_split() -> None:
    args = {
        **{"NUM_HEADS": 4, "VALUE_DIM": 16, "first_items_ptr": ints([0, 1, 4, 4, 6, 99])},
        "out_ptr": torch.zeros(1, dtype=torch.bfloat16),
    }

    found = costs.of_merge((4, 4), None, args)

    assert found["bytes"] == 5 * (64 + 4) * 4 + 2 * 64 * 2


@pytest.mark.parametrize(("source", "reads"), [("plain", 1), ("gate", 2), ("norm", 3)])
def test_rounding_moves_its_rows_and_what_they_are_made_of(source: str, reads: int) -> None:
    args = {
        "x_ptr": torch.zeros(3, 16, dtype=torch.bfloat16),
        "values_ptr": torch.zeros(3, 8, dtype=torch.uint8),
        "scales_ptr": torch.zeros(3, 1),
        "SOURCE": source,
    }

    assert costs.of_rounding(None, None, args) == {"bytes": 24 * (1 + 2 * reads) + 12, "flops": 0}


def test_product_of_rows_reads_its_weight_once_and_no_parts() -> None:
    args = {
        **{"x_ptr": torch.zeros(3, 8), "weight_ptr": torch.zeros(4, 8), "num_rows": 3},
        **{"out_ptr": torch.zeros(3, 4), "part_ptr": torch.zeros(9, 9), "counts_ptr": ints([0])},
    }

    assert costs.of_rows_product(None, None, args) == {"bytes": 68 * 4, "flops": 2 * 32 * 3}


def test_latents_are_read_once_for_all_heads() -> None:
    heads, latent, rope = 32, 512, 64
    args = {
        "NUM_HEADS": heads,
        "GROUP": 16,
        "LATENT": latent,
        "ROPE": rope,
        "SINGLE": True,
        "items_ptr": torch.tensor([[0, 0, 100, 1], [1, 0, 64, 2], [1, 64, 90, 2], [9, 0, 9, 9]]),
        "num_items_ptr": torch.tensor([3]),
        "q_ptr": torch.empty(2, heads, latent + rope, dtype=torch.bfloat16),
        "cache_ptr": torch.empty(9, dtype=torch.bfloat16),
    }

    found = costs.of_latent_attention(None, None, args)

    moved = 2 * heads * (latent + rope + latent)
    assert found["bytes"] == 2 * (190 * (latent + rope) + moved)
    assert found["flops"] == 2 * 190 * heads * (latent + rope + latent)
