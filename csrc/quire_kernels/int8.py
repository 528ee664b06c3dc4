"""Rows and weights in 8-bit integers on a GPU: rounding, alone or behind what makes rows, products.

Rows get a scale each, their largest by 127. The kernels are those for e4m3, told by the dtype.
Importing this module never imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire_kernels import ops
from quire_kernels.fp8 import has_room_for_tiles
from quire_kernels.with_triton import kernels as _kernels

Rounded = tuple[Tensor, Tensor]
# Of a longer one tiles make a product sooner, though most of their rows are empty: 14336 -> 4096 19
# us against 37, one H200; 4096 -> 4096 10 against 5.
LONGEST_ROW = 8192


def rounds_in_one_pass(x: Tensor, size: int) -> bool:
    """Answer whether rows of `size` numbers are rounded by one launch with what makes them."""
    if not x.is_cuda or torch.version.hip is not None:
        return False
    rows = _kernels("fp8_rows")
    return rows is not None and bool(rows.serves(x, size, None))


def quantize(x: Tensor) -> Rounded:
    """Round `x` [rows, size]: int8 from -127 to 127, and scales, float32 [rows, 1].

    The scale of zeros is 1; a row that has a NaN or an infinity has the scale NaN.
    """
    if rounds_in_one_pass(x, x.shape[1]):
        return _in_one_pass(x, x.shape[1])
    values, scales = ops.quantize_rows(x.contiguous())
    return (values ^ 128).view(torch.int8), scales[:, None]


def _in_one_pass(x: Tensor, size: int, **source: Any) -> Rounded:
    values = torch.empty((x.shape[0], size), dtype=torch.int8, device=x.device)
    scales = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    _kernels("fp8_rows").quantize(x, (values, scales), **source)
    return values, scales


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Rounded, Tensor]:
    """Return quantize(rms_norm(x + residual)) and x + residual, which may be made in x's memory."""
    if rounds_in_one_pass(x, x.shape[1]) and residual.stride(1) == 1:
        return _in_one_pass(x, x.shape[1], norm=(residual, weight, eps)), x
    normed, total = ops.add_rms_norm(x, residual, weight, eps)
    return quantize(normed), total


def silu_mul_quantize(gate_up: Tensor) -> Rounded:
    """Return quantize(silu_mul(gate_up)) of `gate_up` [rows, 2 * size]."""
    size = gate_up.shape[1] // 2
    if rounds_in_one_pass(gate_up, size):
        return _in_one_pass(gate_up, size, gated=True)
    return quantize(ops.silu_mul(gate_up))


def product(
    rounded: Rounded, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Return x W^T + b in `dtype` [rows, out] by a kernel of this package; None: none takes it.

    `weight` int8 [out, in], `scales` float32 [out].
    """
    x, x_scales = rounded
    if not x.is_cuda or torch.version.hip is not None or _kernels("fp8_gemv") is None:
        return None
    gemv, gemm = _kernels("fp8_gemv"), _kernels("fp8_gemm")
    takes_tiles = has_room_for_tiles(x.device) and gemm.serves(x, weight, dtype, None)
    is_long = weight.shape[1] > LONGEST_ROW and takes_tiles
    if gemv.serves(x, weight, None) and not is_long:
        kernels = gemv
    elif takes_tiles:
        kernels = gemm
    else:
        return None
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    kernels.linear(x, weight, (x_scales, scales), out, bias=bias)
    return out
