"""SiLU or GELU of the gate times up, in Triton; `ops` has what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.overlap import let_next_begin, options, wait_for_previous
from quire_kernels.rounding import rounded

# Blocks and warps: of few rows, of more, and of as many as fill a GPU several times.
_FEW, _SOME, _MANY = (1024, 4), (1024, 8), (4096, 16)


@triton.jit
def silu(x):
    """Return x * sigmoid(x) in float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    """Return GELU approximated by tanh in float32: x / 2 * (1 + tanh(u)) is x * sigmoid(2 u)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@triton.jit(launch_metadata=costs.of_tensors)
def _gated_kernel(
    gate_up_ptr,
    out_ptr,
    stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_GELU: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Make BLOCK outputs of one row."""
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    at = gate_up_ptr + row * stride + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + SIZE, mask=inside, other=0.0).to(tl.float32)
    activated = gelu(gate) if IS_GELU else silu(gate)
    out = rounded(activated, dtype).to(tl.float32) * up
    tl.store(out_ptr + row * SIZE + columns, rounded(out, dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return `ops.silu_mul` of rows whose values are neighbours."""
    return _gated(gate_up, is_gelu=False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Return `ops.gelu_mul` of rows whose values are neighbours."""
    return _gated(gate_up, is_gelu=True)


def _gated(gate_up: Tensor, *, is_gelu: bool) -> Tensor:
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        block, warps = _FEW if num_rows <= 128 else _SOME if num_rows < 1024 else _MANY
        grid = (num_rows, triton.cdiv(size, block))
        _gated_kernel[grid](
            gate_up,
            out,
            gate_up.stride(0),
            SIZE=size,
            BLOCK=block,
            IS_GELU=is_gelu,
            num_warps=warps,
            **options(),
        )
    return out
