"""RMSNorms whose weight multiplies in float32, before the one rounding: for `quire_kernels.ops`.

`ops.rms_norm` rounds before the weight, as Llama does. Importing this module imports no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire_kernels.with_triton import kernels as triton_kernels


def wide_rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, batch_invariant: bool = False
) -> Tensor:
    """Return x / rms(x) * (offset + weight) over the last dimension, rounded once.

    `x` [..., size], `weight` [size] of the same dtype. `batch_invariant`: a row has the same bits
    however many there are.
    Source: Gemma Team, "Gemma", 2024, whose weights are offset by 1.
    """
    if x.is_cuda and (kernels := triton_kernels("norms")) and x.shape[-1] <= kernels.MAX_SIZE:
        out: Tensor = kernels.rms_norm(x, weight, eps, offset=offset, is_fixed=batch_invariant)
        return out
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    normed = torch.mul(wide, scale, out=None if wide is x else wide)
    return normed.mul_(weight.float() + offset).to(x.dtype)


def add_wide_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (wide_rms_norm(x + residual), x + residual); the sum may be made in x's memory.

    `x`, `residual` [num_tokens, size], `weight` [size].
    """
    if x.is_cuda and (kernels := triton_kernels("norms")) and x.shape[-1] <= kernels.MAX_SIZE:
        pair: tuple[Tensor, Tensor] = kernels.add_rms_norm(
            x, residual, weight, eps, offset=offset, is_fixed=batch_invariant
        )
        return pair
    total = x.add_(residual)
    normed = wide_rms_norm(total, weight, eps, offset=offset, batch_invariant=batch_invariant)
    return normed, total
