"""How products with experts are cut: measured where a card and a shape were, a guess elsewhere.

`tests/benchmarks/gpu_experts.py --write` measures and writes the table.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import torch
from attrs import frozen

TABLE = "experts_table.json"
# Their multiprocessors are the same, so that one's rows serve the other where it has none.
ALIKE = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
# A table's row is for as many pairs an expert on average, or fewer.
BUCKETS = tuple(2**power for power in range(11))
_FEW_ROWS = 16


@frozen
class Cut:
    """One product: rows and outputs a tile, columns a block, warps, and blocks on their way."""

    rows: int
    outputs: int
    columns: int
    warps: int
    stages: int


# Of gate and up, and of the way back; their tiles have the same rows.
Cuts = tuple[Cut, Cut]


def bucket_of(num_pairs: int, num_experts: int) -> int:
    """Return the first bucket that is not below the pairs an expert has on average."""
    return next((b for b in BUCKETS if num_pairs <= b * num_experts), BUCKETS[-1])


def name_of(shape: tuple[int, int, int, int], *, biased: bool = False) -> str:
    """Return what a table calls experts, experts a token, hidden size and an expert's size.

    `biased`: their products are those of `biased_experts`.
    """
    return "x".join(map(str, shape)) + (" with biases" if biased else "")


@functools.cache
def _table() -> dict[str, Any]:
    found = resources.files("quire_kernels").joinpath(TABLE)
    table: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return table


@functools.cache
def _measured(card: str, shape: str, bucket: int) -> Cuts | None:
    for name in (card, *(ALIKE if card in ALIKE else ())):
        row = _table().get(name, {}).get(shape, {}).get(str(bucket))
        if row is not None:
            return Cut(row[0], *row[1]), Cut(row[0], *row[2])
    return None


def guessed(bucket: int, dtype: torch.dtype) -> Cuts:
    """Return cuts for a card or a shape that nobody measured."""
    if dtype.itemsize == 1:
        # The best of those that one H200 was asked for with 128 experts of 768.
        rows = min(128, max(_FEW_ROWS, 2 * bucket))
        return Cut(rows, 64, 128, 4, 3), Cut(rows, 64 if rows == 128 else 128, 128, 4, 3)
    if dtype == torch.float32:
        rows = min(64, max(_FEW_ROWS, bucket))
        return Cut(rows, 32, 32, 4, 2), Cut(rows, 32, 32, 4, 2)
    if bucket >= 64:
        return Cut(128, 64, 64, 8, 3), Cut(128, 128, 64, 8, 3)
    rows = min(64, max(_FEW_ROWS, 2 * bucket))
    return Cut(rows, 64, 64, 4, 3), Cut(rows, 64, 64, 4, 3)


def cuts_of(
    device: torch.device, dtype: torch.dtype, num_pairs: int, shape: tuple[int, int, int, int]
) -> Cuts:
    """Return how to cut both products of so many pairs; `shape` as `name_of` takes it.

    `dtype` is the weights'.
    """
    bucket = bucket_of(num_pairs, shape[0])
    if dtype.itemsize == 2 and device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        if (found := _measured(card, name_of(shape), bucket)) is not None:
            return found
    return guessed(bucket, dtype)


def biased_cuts_of(
    device: torch.device, dtype: torch.dtype, num_pairs: int, shape: tuple[int, int, int, int]
) -> Cuts:
    """Return the same for the products of `biased_experts`."""
    if dtype.itemsize == 2 and device.type == "cuda":
        card, name = torch.cuda.get_device_name(device), name_of(shape, biased=True)
        if (found := _measured(card, name, bucket_of(num_pairs, shape[0]))) is not None:
            return found
    each = max(1, num_pairs // shape[0])
    rows = min(max(1 << (each - 1).bit_length(), _FEW_ROWS), 64)
    return Cut(rows, 64, 64, 4, 3), Cut(rows, 64, 64, 4, 3)
