"""Norms, activations and rounding of `quire_kernels.ops` on a CPU, each in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from quire_kernels.cpu import LIBRARY, calls

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def is_built() -> bool:
    """Answer whether the library is there; operations never wait for a compiler."""
    return LIBRARY.is_built()


def serves(x: Tensor) -> bool:
    """Answer whether `x` is one that the kernels take."""
    return x.dtype in _DTYPES and x.is_contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Return x / rms(x) * weight over the last dimension; `residual` is added into x before."""
    out = torch.empty_like(x)
    call = calls.RowsCall(
        x=x.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        num_rows=x.numel() // x.shape[-1],
        size=x.shape[-1],
        eps=eps,
    )
    calls.library().quire_norm(calls.best_isa(), _DTYPES[x.dtype], call, torch.get_num_threads())
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of `gate_up` [num_tokens, 2 * size], gate first."""
    num_rows, width = gate_up.shape
    out = gate_up.new_empty(num_rows, width // 2)
    call = calls.RowsCall(
        x=gate_up.data_ptr(), out=out.data_ptr(), num_rows=num_rows, size=width // 2
    )
    dtype = _DTYPES[gate_up.dtype]
    calls.library().quire_silu_mul(calls.best_isa(), dtype, call, torch.get_num_threads())
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` [num_rows, size] as uint8 around 128, and float32 scales [num_rows]."""
    num_rows, size = x.shape
    values = torch.empty(num_rows, size, dtype=torch.uint8)
    scales = torch.empty(num_rows, dtype=torch.float32)
    call = calls.RowsCall(
        x=x.data_ptr(),
        out=values.data_ptr(),
        scales=scales.data_ptr(),
        num_rows=num_rows,
        size=size,
    )
    dtype = _DTYPES[x.dtype]
    calls.library().quire_quantize(calls.best_isa(), dtype, call, torch.get_num_threads())
    return values, scales
