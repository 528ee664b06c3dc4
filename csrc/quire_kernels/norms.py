"""RMSNorm in Triton, alone or after the residual is added; `ops` has what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.overlap import let_next_begin, options, wait_for_previous
from quire_kernels.rounding import rounded

# A longer row does not fit the registers of the one program that norms it.
MAX_SIZE = 16384
# So many rows fill a GPU, and several of them can share a program.
_MANY_ROWS = 1024


@triton.jit(do_not_specialize=["num_rows"], launch_metadata=costs.of_norm)
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    num_rows,
    eps,
    offset,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Norm ROWS rows; with ADDS the residual is added first, and the sum replaces x.

    IS_WIDE: offset + weight multiplies before anything is rounded.
    """
    let_next_begin(OVERLAPS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < SIZE
    if ROWS > 1:
        inside = inside & (rows < num_rows)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAPS)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        at = residual_ptr + rows * residual_stride + columns
        total = rounded(x + tl.load(at, mask=inside, other=0.0).to(tl.float32), dtype)
        tl.store(x_ptr + rows * x_stride + columns, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)
    normed = x * scale[:, None]
    if IS_WIDE:
        weight = weight + offset
    else:
        normed = rounded(normed, dtype).to(tl.float32)
    tl.store(out_ptr + rows * SIZE + columns, rounded(normed * weight, dtype), mask=inside)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float | None,
    *,
    is_fixed: bool,
) -> Tensor:
    """Norm the rows of `x` [num_rows, size] into new memory; `is_fixed`: each by a program."""
    num_rows, size = x.shape
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    block = triton.next_power_of_2(size)
    rows = max(1, 2048 // block) if num_rows >= _MANY_ROWS and not is_fixed else 1
    _norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        num_rows,
        eps,
        offset or 0.0,
        SIZE=size,
        BLOCK=block,
        ROWS=rows,
        ADDS=residual is not None,
        IS_WIDE=offset is not None,
        # 16 bytes a thread and load in 16 bits.
        num_warps=min(16, max(1, block * rows // 256)),
        **options(),
    )
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, offset: float | None = None, is_fixed: bool = False
) -> Tensor:
    """Return `ops.rms_norm`, with an offset `ops.wide_rms_norm`, for rows of at most MAX_SIZE."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return _launch(flat, None, weight, eps, offset, is_fixed=is_fixed).view(x.shape)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float | None = None,
    is_fixed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return what `rms_norm` does for the sum, and the sum; values of a row are neighbours."""
    return _launch(x, residual, weight, eps, offset, is_fixed=is_fixed), x
