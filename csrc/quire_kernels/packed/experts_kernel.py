"""`experts.widen` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.packed.experts import StackedWeight
from quire_kernels.rounding import rounded

# Outputs and inputs of a program. 128 experts of 768 on an H100, all of them and the products with
# them: inputs as they lie 1,302 us, 3,118 in 32 x 128; in an order 3,289, 17,589 where the wide
# numbers were scattered instead.
_TILE, _ORDERED_TILE = (16, 256), (32, 128)


@triton.jit
def _codes(base, place, BITS: tl.constexpr, mask):
    """Return the codes at some places of a string of bits."""
    bit = place * BITS
    found = tl.load(base + (bit >> 3), mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:
        # A code may reach into the next byte, unless it ends with its own.
        reaches = mask & ((bit & 7) + BITS > 8)
        found |= tl.load(base + (bit >> 3) + 1, mask=reaches, other=0).to(tl.int32) << 8
    return (found >> (bit & 7)) & ((1 << BITS) - 1)


@triton.jit(launch_metadata=costs.of_tensors)
def _widen_kernel(
    values_ptr, scales_ptr, zeros_ptr, columns_ptr, ids_ptr, out_ptr, num_out, num_in, groups,
    row_bytes, group_bytes, part_size, BITS: tl.constexpr, GROUP: tl.constexpr,
    ORDERED: tl.constexpr, CHOSEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Make ROWS outputs of COLUMNS inputs of one chosen expert wide."""
    number = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + number).to(tl.int64) if CHOSEN else number
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    inputs = (tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < num_out) & (inputs < num_in)
    columns = inputs
    if ORDERED:
        parts = num_out // part_size
        columns_ptr += (expert * parts + rows // part_size) * num_in
        columns = tl.load(columns_ptr + inputs, mask=inside, other=0)
    group = columns // GROUP
    values = values_ptr + (expert * num_out + rows) * row_bytes
    codes = _codes(values, columns, BITS, inside)
    zeros = zeros_ptr + (expert * groups + group) * group_bytes
    zeros = _codes(zeros, rows, BITS, inside)
    scales = tl.load(scales_ptr + (expert * groups + group) * num_out + rows, mask=inside)
    wide = (codes - zeros).to(tl.float32) * scales.to(tl.float32)
    out = out_ptr + (number * num_out + rows) * num_in + inputs
    tl.store(out, rounded(wide, out_ptr.dtype.element_ty), mask=inside)


def widen(weight: StackedWeight, expert_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `experts.widen`; the tensors are contiguous."""
    num_experts, groups, num_out = weight.scales.shape
    num_in, device = weight.num_inputs, weight.values.device
    num_chosen = num_experts if expert_ids is None else len(expert_ids)
    out = torch.empty(num_chosen, num_out, num_in, dtype=dtype, device=device)
    if not num_chosen:
        return out
    parts = 1 if weight.columns is None else weight.columns.shape[1]
    rows, columns = _TILE if weight.columns is None else _ORDERED_TILE
    grid = (num_chosen, triton.cdiv(num_out, rows), triton.cdiv(num_in, columns))
    _widen_kernel[grid](
        weight.values, weight.scales, weight.zeros, weight.columns, expert_ids, out,
        num_out, num_in, groups, weight.values.shape[-1], weight.zeros.shape[-1],
        num_out // parts,
        BITS=weight.bits,
        GROUP=weight.group_size,
        ORDERED=weight.columns is not None,
        CHOSEN=expert_ids is not None,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )  # fmt: skip
    return out
