"""x W^T + b with W in tiles: which kernel takes which number of rows."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from quire_kernels import ops
from quire_kernels.packed import calls
from quire_kernels.packed.layout import TILE_OUT, TiledWeight, widened

# From so many rows on a wide weight and cuBLAS take less time than the codes. One H100, the four
# products of a layer of Llama-3.1-8B: 1,243 us and 1,340 wide at 2,048 rows, 1,667 and 1,567 at
# 2,304, where 14,336 inputs of them no longer fit into the L2.
WIDE_ROWS = 2049
# Numbers of a weight that are wide at one time: 128 MiB.
WIDE_NUMBERS = 1 << 26
_DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Answer whether products on this device have kernels."""
    return device.type == "cuda" and dtype in _DTYPES and _has_triton()


def linear(x: Tensor, weight: TiledWeight, bias: Tensor | None) -> Tensor:
    """Return x W^T + b of `x` [rows, in_features]: [rows, out_features]."""
    out = x.new_empty(x.shape[0], weight.out_features)
    write_linear(x, weight, bias, out)
    return out


def write_linear(x: Tensor, weight: TiledWeight, bias: Tensor | None, out: Tensor) -> None:
    """Write the product into `out` [rows, out_features], which may be cut from wider rows."""
    rows = x.shape[0]
    if rows == 0:
        return
    x = _aligned(x)
    if not x.is_cuda or x.dtype not in _DTYPES:
        out.copy_(ops.linear(x, widened(weight).to(x.dtype), bias))
        return
    kernels = calls.kernels(x.device)
    if kernels is not None and kernels.takes_few_rows(x, weight):
        kernels.few_rows(x, weight, bias, out)
    elif kernels is not None and kernels.has_many_rows and rows < WIDE_ROWS:
        kernels.many_rows(x, weight, bias, out)
    else:
        _write_slowly(x, weight, bias, out)


def _write_slowly(x: Tensor, weight: TiledWeight, bias: Tensor | None, out: Tensor) -> None:
    from quire_kernels.packed import triton_kernels

    if x.shape[0] <= triton_kernels.MAX_ROWS:
        triton_kernels.multiply_few_rows(x, weight, bias, out)
        return
    kernels = calls.kernels(x.device)
    widen = triton_kernels.widen if kernels is None else kernels.widen
    step = max(128, WIDE_NUMBERS // weight.in_features // 128 * 128)
    for first in range(0, weight.out_features, step):
        end = min(first + step, weight.out_features)
        wide = widen(weight.outputs(first, end), x.dtype)
        part = out[:, first:end]
        if bias is None:
            torch.mm(x, wide.t(), out=part)
        else:
            torch.addmm(bias[first:end], x, wide.t(), out=part)


def _aligned(x: Tensor) -> Tensor:
    """Return x, or a copy that may be read 16 bytes at a time."""
    is_aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def fuses_norm(x: Tensor, weight: TiledWeight, *, gated: bool = False) -> bool:
    """Whether a norm before a product is part of its kernel: for few rows, where it is built."""
    kernels = _compiled(x)
    return kernels is not None and kernels.takes_few_rows(x, weight, 2 if gated else 1)


def fuses_silu_mul(x: Tensor, weight: TiledWeight) -> bool:
    """Whether SiLU behind a product is part of its kernel: for many rows, where it is built."""
    kernels = _compiled(x)
    return (
        kernels is not None
        and kernels.has_many_rows
        and 0 < x.shape[0] < WIDE_ROWS
        and weight.out_features % (2 * TILE_OUT) == 0
    )


def _compiled(x: Tensor) -> calls.Kernels | None:
    return calls.kernels(x.device) if x.is_cuda and x.dtype in _DTYPES else None


def linear_silu_mul(x: Tensor, weight: TiledWeight) -> Tensor:
    """Return silu of the first half of the outputs times the second, where `fuses_silu_mul`."""
    x, out = _aligned(x), x.new_empty(x.shape[0], weight.out_features // 2)
    kernels = _compiled(x)
    assert kernels is not None, "fuses_silu_mul says that there are none"
    kernels.many_rows(x, weight, None, out, gated=True)
    return out


def add_rms_norm_linear(
    addends: tuple[Tensor, Tensor],
    norm: tuple[Tensor, float],
    weight: TiledWeight,
    bias: Tensor | None,
    *,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return linear(rms_norm(sum of addends)) and the sum, where `fuses_norm`.

    `gated`: silu of the first half of the outputs times the second.
    """
    x, residual = (_aligned(addend) for addend in addends)
    out = x.new_empty(x.shape[0], weight.out_features // (2 if gated else 1))
    kernels = calls.kernels(x.device)
    assert kernels is not None, "fuses_norm says that there are none"
    total = kernels.few_rows(x, weight, bias, out, norm=(residual, *norm), gated=gated)
    return out, total
