"""Products with weights in e4m3: by kernels, by `torch._scaled_mm`, else widened piece by piece.

The last is the meaning. On a CPU it is computed in float32, and rounded once; on a GPU, where
float32 is slow, both sides are rounded to the model's dtype, as a plain weight and input are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from attrs import frozen
from torch import Tensor

from quire.interfaces.quantization import QuantizedActivation
from quire_kernels import fp8
from quire_quant.fp8.numbers import dequantized, piece_rows, widened_weight

MULTIPLE = 16  # of inputs and outputs, of which the kernels of `_scaled_mm` are made


@frozen(kw_only=True)
class Weight(fp8.Matrix):
    """A weight in e4m3; `is_uniform`: all scales are one number."""

    is_uniform: bool = False

    def part(self, index: int) -> Weight:
        """Return one projection alone, without blocks."""
        assert self.block is None
        first, size = sum(self.sizes[:index]), self.sizes[index]
        rows = slice(first, first + size)
        return Weight(values=self.values[rows], scales=self.scales[rows], sizes=(size,))

    def row_scales(self) -> Tensor:
        """Return scales [out, 1] or [out, in blocks]."""
        if self.block is None:
            return self.scales
        height = self.block[0]
        counts = [-(-size // height) for size in self.sizes]
        parts = zip(self.scales.split(counts), self.sizes, strict=True)
        return torch.cat([part.repeat_interleave(height, 0)[:size] for part, size in parts])

    def wide(self, row_scales: Tensor, rows: slice) -> Tensor:
        """Return rows of the weight, float32."""
        scales = row_scales[rows]
        if self.block is not None:
            scales = scales.repeat_interleave(self.block[1], 1)[:, : self.values.shape[1]]
        return widened_weight(self.values[rows]).mul_(scales)


def dequantized_weight(weight: Weight) -> Tensor:
    """Return the weight [out, in], float32."""
    return weight.wide(weight.row_scales(), slice(None))


def multiply(
    x: Tensor | QuantizedActivation,
    weight: Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    group: int | None = None,
) -> Tensor:
    """Return x W^T + b in `dtype` [rows, out]; `group` inputs of a row share a scale, or all do."""
    if not isinstance(x, QuantizedActivation):
        out = fp8.product(x, None, weight, bias, dtype)
        return _multiply_wide(x.float(), weight, bias, dtype) if out is None else out
    out = fp8.product(x.values, x.scales, weight, bias, dtype)
    if out is not None:
        return out
    if group is None and _fits_scaled_mm(x.values, weight, dtype):
        return _scaled_mm(x, weight, bias, dtype)
    return _multiply_wide(dequantized(x, group), weight, bias, dtype)


def _multiply_wide(x: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    computed = torch.float32 if x.is_cpu else dtype
    x, row_scales = x.to(computed), weight.row_scales()
    num_outputs, step = weight.values.shape[0], piece_rows(weight.values)
    out = torch.empty(x.shape[0], num_outputs, dtype=dtype, device=x.device)
    for first in range(0, num_outputs, step):
        rows = slice(first, first + step)
        piece = functional.linear(x, weight.wide(row_scales, rows).to(computed))
        if bias is not None:
            piece = piece.float().add_(bias[rows])
        out[:, rows] = piece
    return out


def _fits_scaled_mm(x: Tensor, weight: Weight, dtype: torch.dtype) -> bool:
    """Answer whether kernels of `_scaled_mm` take this: rows of bfloat16, scales along rows."""
    num_outputs, num_inputs = weight.values.shape
    is_served = weight.block is None and dtype == torch.bfloat16 and x.shape[0] > 0
    is_served = is_served and not (num_outputs % MULTIPLE or num_inputs % MULTIPLE)
    return is_served and fp8.computes_e4m3(x.device)


def _scaled_mm(
    x: QuantizedActivation, weight: Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows = x.values.shape[0]
    if x.scales.shape[0] == 1 and weight.is_uniform:
        scales = x.scales.view(()), weight.scales[0].view(())
    else:
        scales = x.scales.expand(rows, 1).contiguous(), weight.scales.t()
    out: Tensor = torch._scaled_mm(
        x.values.contiguous(),
        weight.values.t(),
        *scales,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out
