"""Products in tiles that do not depend on the number of rows, in Triton.

A program sums all columns for a tile of rows and outputs, in one order:

    weight [num_out, size]   tile of OUTPUTS x BLOCK  ->  next columns  ->  ...
    x [num_rows, size]       tile of    ROWS x BLOCK  ->  next columns  ->  ...
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.rounding import INTERPRETED, rounded


@triton.jit(do_not_specialize=["num_rows"], launch_metadata=costs.of_product)
def _fixed_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    weight_stride,
    num_rows,
    num_out,
    size,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Make OUTPUTS numbers of ROWS rows; WHOLE: blocks of columns end where the columns do."""
    row_tiles = tl.cdiv(num_rows, ROWS)
    pid = tl.program_id(0)
    # Programs that read the same weights are neighbours.
    outputs = pid // row_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    is_row, is_output = rows < num_rows, outputs < num_out
    columns = tl.arange(0, BLOCK)
    weight_rows = tl.minimum(outputs, num_out - 1).to(tl.int64)
    weight_at = weight_ptr + weight_rows[:, None] * weight_stride + columns[None, :]
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for first in range(0, size, BLOCK):
        if WHOLE:
            weights = tl.load(weight_at)
            x = tl.load(x_at, mask=is_row[:, None], other=0.0)
        else:
            inside = (first + columns < size)[None, :]
            weights = tl.load(weight_at, mask=inside, other=0.0)
            x = tl.load(x_at, mask=inside & is_row[:, None], other=0.0)
        # The interpreter multiplies the bits of bfloat16 as integers.
        if INTERPRETED:
            weights, x = weights.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(weights, tl.trans(x), sums, input_precision="ieee")
        weight_at += BLOCK
        x_at += BLOCK
    if BIASED:
        bias = tl.load(bias_ptr + outputs, mask=is_output, other=0.0)
        sums += bias.to(tl.float32)[:, None]
    out_at = out_ptr + rows.to(tl.int64)[None, :] * num_out + outputs[:, None]
    inside = is_output[:, None] & is_row[None, :]
    tl.store(out_at, rounded(sums, out_ptr.dtype.element_ty), mask=inside)


def tiles(dtype: torch.dtype) -> tuple[int, ...]:
    """Return the rows that a tile may have, in descending order."""
    # Products in float32 use no tensor cores; a larger tile spills registers.
    return (64, 32, 16) if dtype == torch.float32 else (128, 64, 32, 16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """Return x W^T + b in tiles of `rows` rows."""
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    (num_rows, size), num_out = x.shape, weight.shape[0]
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    outputs, block = (64, 32) if x.dtype == torch.float32 else (64, 128)
    grid = triton.cdiv(num_out, outputs) * triton.cdiv(num_rows, rows)
    _fixed_kernel[(grid,)](
        *(x, weight, bias, out),
        *(x.stride(0), weight.stride(0), num_rows, num_out, size),
        ROWS=rows,
        OUTPUTS=outputs,
        BLOCK=block,
        WHOLE=size % block == 0,
        BIASED=bias is not None,
        num_warps=4,
        num_stages=3,
    )
    return out
