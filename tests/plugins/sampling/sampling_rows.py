"""Batches of rows that say how they are sampled, and random logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.interfaces.sampling import SamplingBatch

VOCAB = 12


def make_batch(
    rows: Sequence[dict[str, Any]], *, vocab_size: int = VOCAB, device: str = "cpu"
) -> SamplingBatch:
    """Return a batch of rows with temperature 1, seed 0 and no filter unless they say so."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([row.get(name, default) for row in rows], dtype=dtype, device=device)

    temperature = column("temperature", 1.0, torch.float32)
    top_k = column("top_k", vocab_size, torch.int64)
    top_p = column("top_p", 1.0, torch.float32)
    min_p = column("min_p", 0.0, torch.float32)
    return SamplingBatch(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=column("seed", 0, torch.int64),
        child_index=column("child", 0, torch.int64),
        position=column("position", 0, torch.int64),
        rows=torch.arange(len(rows), dtype=torch.int32, device=device),
        all_greedy=bool((temperature == 0).all()),
        any_greedy=bool((temperature == 0).any()),
        any_top_k=bool((top_k < vocab_size).any()),
        any_top_p=bool((top_p < 1).any()),
        any_min_p=bool((min_p > 0).any()),
    )


def draw_logits(rows: int, seed: int = 0, *, vocab_size: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
