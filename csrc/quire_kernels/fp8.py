"""Rows and weights in e4m3: rounding of activations, alone or behind what makes them, and products.

Each function has a PyTorch body, which is its meaning, and kernels for CUDA in modules beside
this one. Importing this module never imports Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as functional
from attrs import frozen
from torch import Tensor

from quire_kernels import ops
from quire_kernels.with_triton import kernels as _kernels

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# From here on a GPU multiplies and rounds e4m3.
SMALLEST_CAPABILITY = (8, 9)
Rounded = tuple[Tensor, Tensor]


@frozen(kw_only=True)
class Scaling:
    """Where the scales of activations come from.

    By themselves rows get one each, or each `group` of their numbers, that takes the largest to
    448; numbers beyond `largest` are clipped. `given`, float32 [1], is a scale for all.
    """

    group: int | None = None
    largest: float | None = None
    given: Tensor | None = None


@functools.cache
def computes_e4m3(device: torch.device) -> bool:
    """Answer whether kernels in e4m3 run here: an NVIDIA GPU from compute capability 8.9 on."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= SMALLEST_CAPABILITY


@functools.cache
def has_room_for_tiles(device: torch.device) -> bool:
    """Answer whether multiprocessors have the 227 KiB of memory that tiles are made for."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def rounds_in_one_pass(x: Tensor, size: int, scaling: Scaling) -> bool:
    """Answer whether rows of `size` numbers are rounded by one launch with what makes them."""
    if not computes_e4m3(x.device):
        return False
    rows = _kernels("fp8_rows")
    return rows is not None and bool(rows.serves(x, size, scaling.group))


def rounded(wide: Tensor, scales: Tensor) -> Tensor:
    """Return `wide` / `scales` in e4m3, to nearest even; beyond 448 is 448, NaN stays NaN."""
    return (wide / scales).clamp_(-LARGEST, LARGEST).to(E4M3)


def quantize(x: Tensor, scaling: Scaling) -> Rounded:
    """Round `x` [rows, size]: values in e4m3, and scales, float32 [rows, 1] or [rows, groups].

    The scale of zeros is 1. A given one comes back as [1, 1].
    """
    if rounds_in_one_pass(x, x.shape[1], scaling):
        return _in_one_pass(x, x.shape[1], scaling)
    if scaling.given is not None:
        return rounded(x.float(), scaling.given), scaling.given.view(1, 1)
    rows, size = x.shape
    width = min(scaling.group or size, size)
    padded = functional.pad(x.float(), (0, -size % width))
    wide = padded.view(rows, -(-size // width), width)
    extreme = wide.abs().amax(-1, keepdim=True)
    if scaling.largest is not None:
        extreme = extreme.clamp(max=scaling.largest)
    smallest = torch.finfo(torch.float32).tiny
    scales = torch.where(extreme > 0, (extreme / LARGEST).clamp(min=smallest), 1.0)
    values = rounded(wide, scales).view(padded.shape)[:, :size]
    return values, scales.squeeze(-1)


def _in_one_pass(x: Tensor, size: int, scaling: Scaling, **source: Any) -> Rounded:
    values = torch.empty((x.shape[0], size), dtype=E4M3, device=x.device)
    if scaling.given is None:
        groups = -(-size // scaling.group) if scaling.group else 1
        scales = torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device)
    else:
        scales = scaling.given.view(1, 1)
    keys = {"group": scaling.group, "largest": scaling.largest, "given": scaling.given}
    _kernels("fp8_rows").quantize(x, (values, scales), **keys, **source)
    return values, scales


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scaling: Scaling
) -> tuple[Rounded, Tensor]:
    """Return quantize(rms_norm(x + residual)) and x + residual, which may be made in x's memory."""
    if rounds_in_one_pass(x, x.shape[1], scaling) and residual.stride(1) == 1:
        found = _in_one_pass(x, x.shape[1], scaling, norm=(residual, weight, eps))
        return found, x
    normed, total = ops.add_rms_norm(x, residual, weight, eps)
    return quantize(normed, scaling), total


def silu_mul_quantize(gate_up: Tensor, scaling: Scaling) -> Rounded:
    """Return quantize(silu_mul(gate_up)) of `gate_up` [rows, 2 * size]."""
    size = gate_up.shape[1] // 2
    if rounds_in_one_pass(gate_up, size, scaling):
        return _in_one_pass(gate_up, size, scaling, gated=True)
    return quantize(ops.silu_mul(gate_up), scaling)


@frozen(kw_only=True)
class Matrix:
    """A weight in e4m3 [out, in] and its scales, float32.

    `scales` [out, 1], or [blocks, in blocks] where `block` says how many outputs and inputs share
    one; the blocks of each of the projections, whose outputs are `sizes`, begin anew.
    """

    values: Tensor
    scales: Tensor
    sizes: tuple[int, ...]
    block: tuple[int, int] | None = None


def _groups(weight: Matrix) -> int:
    return weight.scales.shape[1]


def product(
    x: Tensor, x_scales: Tensor | None, weight: Matrix, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Return x W^T + b in `dtype` [rows, out] by a kernel of this package; None: none takes it.

    `x` [rows, in] is in e4m3 with `x_scales` [rows, 1], [1, 1] or, with blocks, [rows, in blocks];
    or it has the dtype of the result and no scales.
    """
    if not computes_e4m3(x.device) or _kernels("fp8_gemv") is None:
        return None
    gemv, gemm = _kernels("fp8_gemv"), _kernels("fp8_gemm")
    block, num_out = weight.block, weight.values.shape[0]
    begins_anew = block is not None and any(n % block[0] for n in weight.sizes[:-1])
    is_like_blocks = (
        block is None or x_scales is None or x_scales.shape[1:] == weight.scales.shape[1:]
    )
    if begins_anew or not is_like_blocks:
        return None
    if gemv.serves(x, weight.values, block):
        kernels = gemv
    elif x_scales is None or not has_room_for_tiles(x.device):
        return None
    elif gemm.serves(x, weight.values, dtype, block):
        kernels = gemm
    else:
        return None
    out = torch.empty((x.shape[0], num_out), dtype=dtype, device=x.device)
    scales = x_scales, weight.scales
    kernels.linear(x, weight.values, scales, out, bias=bias, block=block)
    return out
