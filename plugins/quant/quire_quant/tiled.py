"""Weights of 4 and 8 bits as tiles, where the device has kernels for those.

A tile holds codes of 4 bits. A code of 8 bits is 16 * high + low, so a weight of 8 bits is one of 4
bits with twice the inputs, which sees each input twice:

    inputs     0 .. n - 1       n .. 2 n - 1
    codes      low halves       high halves
    scales     s                16 s
    zeros      low halves       high halves
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quire_kernels.packed import layout, product

if TYPE_CHECKING:
    from quire_quant.packed import PackedForm

# Smaller groups of 8-bit codes would hold 3% more than the checkpoint, for their second scale.
LEAST_GROUP_OF_8_BITS = 128


def lies_in_tiles(form: PackedForm, scales: Tensor) -> bool:
    """Answer whether the kernels of the layer's device multiply with such a weight."""
    dtype = getattr(torch, form.dtype)
    if form.bits not in (4, 8) or not product.serves(torch.device(form.device), dtype):
        return False
    inputs, group_size = form.in_features * form.bits // 4, form.group_size
    if form.bits == 8 and group_size < LEAST_GROUP_OF_8_BITS:
        return False
    if form.bits == 8 and not bool((scales * 16).isfinite().all()):
        return False
    return not any(layout.why_not(n, inputs, group_size) for n in form.part_sizes)


def to_tiles(form: PackedForm, values: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """Return tiles, scales and zeros as the kernels want them, of what `PackedProduct` keeps."""
    if form.bits == 4:
        return {"tiles": layout.tiles_of(values), "scales": scales, "zeros": zeros}
    rows, inputs = values.shape
    shape = (rows // layout.TILE_OUT, inputs * 2 // layout.TILE_IN, 32, 4)
    tiles = torch.empty(shape, dtype=torch.int32, device=values.device)
    for outputs in form.pieces():
        codes = torch.cat((values[outputs] & 15, values[outputs] >> 4), 1)
        places = slice(outputs.start // layout.TILE_OUT, outputs.stop // layout.TILE_OUT)
        tiles[places] = layout.to_tiles(_halved(codes))
    return {
        "tiles": tiles,
        "scales": torch.cat((scales, scales * 16)),
        "zeros": _halved(torch.cat((zeros & 15, zeros >> 4))),
    }


def _halved(codes: Tensor) -> Tensor:
    """Return two codes of 4 bits a byte, of one a byte."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def input_of(form: PackedForm, x: Tensor) -> Tensor:
    """Return what tiles are multiplied with."""
    return x if form.bits == 4 else torch.cat((x, x), 1)


def widened(form: PackedForm, weight: layout.TiledWeight) -> Tensor:
    """Return the weight of tiles, float32 [outputs, in_features]."""
    wide = layout.widened(weight)
    return wide if form.bits == 4 else wide.unflatten(1, (2, -1)).sum(1)
