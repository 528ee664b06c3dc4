"""Products of 8-bit integers with int32 sums: oneDNN's on a CPU, PyTorch's elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from quire_kernels.cpu import products
from quire_kernels.cpu.products import QUAD, TILE_OUT

# Activations are kept as value + 128: oneDNN multiplies uint8 by int8 natively.
ZERO_POINT = 128
# Sums of more could leave 32 bits.
MOST_INPUTS_IN_TILES = 1 << 16
# `torch._int_mm` on a GPU wants more rows than 16 and other sizes in multiples of 8.
MIN_ROWS_ON_GPU, MULTIPLE_ON_GPU = 32, 8
# What is made wide beside a layer is so many weights at a time: some megabytes.
PIECE_ELEMENTS = 1 << 22
# The overload itself: finding it by name costs 8 us a call.
_qlinear = torch.ops.onednn.qlinear_pointwise.default


def takes_tiles(num_outputs: int, num_inputs: int) -> bool:
    """Whether `quire_kernels.cpu` multiplies here: where it is built, and oneDNN is not as good."""
    if num_inputs % QUAD or num_inputs > MOST_INPUTS_IN_TILES or not products.is_built():
        return False
    # Tiles are filled up, which a weight of many outputs alone does not feel.
    if -num_outputs % TILE_OUT * 100 > num_outputs:
        return False
    return products.multiplies_integers_fast() or not packs()


def packs() -> bool:
    """Whether oneDNN sums in 32 bits here; without VNNI pairs are summed in 16, and saturate."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_vnni_supported())


def pack(values: Tensor) -> Tensor:
    """Return int8 [out_features, in_features] in oneDNN's layout."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(values, None)
    return packed


def multiply_packed(
    x: Tensor, x_scale: float, packed: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return (x - 128) * x_scale times the weight, rounded once to float32 or bfloat16."""
    zeros = _zeros(scales.shape[0])
    out: Tensor = _qlinear(
        x, x_scale, ZERO_POINT, packed, scales, zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return out


_ZEROS: dict[int, Tensor] = {}


def _zeros(count: int) -> Tensor:
    """Return the zero points of as many outputs, shared by all layers of a size."""
    if count not in _ZEROS:
        _ZEROS[count] = torch.zeros(count, dtype=torch.int32)
    return _ZEROS[count]


def multiply(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Return float32 (x - 128) W^T * scales, `x` uint8 and W `values` int8."""
    return multiply_signed((x ^ ZERO_POINT).view(torch.int8), values, scales)


def multiply_signed(signed: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Return float32 x W^T * scales, x `signed` and W `values` in int8."""
    if not signed.is_cuda:
        return _multiply_wide(signed, values).float() * scales
    if any(size % MULTIPLE_ON_GPU for size in values.shape):
        return (signed.float() @ values.T.float()) * scales
    num_rows = signed.shape[0]
    if num_rows < MIN_ROWS_ON_GPU:
        signed = torch.nn.functional.pad(signed, (0, 0, 0, MIN_ROWS_ON_GPU - num_rows))
    return torch._int_mm(signed, values.T)[:num_rows].float() * scales


def _multiply_wide(signed: Tensor, values: Tensor) -> Tensor:
    """Return exact sums in float64, some outputs at a time.

    Not by `torch._int_mm`: that of PyTorch 2.13 gives zeros on a CPU for one input and one row.
    """
    wide, rows = signed.double(), max(1, PIECE_ELEMENTS // values.shape[1])
    return torch.cat([wide @ piece.double().T for piece in values.split(rows)], 1)
