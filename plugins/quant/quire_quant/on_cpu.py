"""Products with packed weights of 4 and 8 bits on a CPU, where `quire_kernels.cpu` is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quire_kernels import ops
from quire_kernels.cpu import products
from quire_kernels.cpu.products import PackedWeight

if TYPE_CHECKING:
    from quire_quant.packed import PackedForm

__all__ = ["PackedWeight", "by_output", "multiplies", "write_linear"]

# Up to so many rows codes are multiplied as they are. One core with AVX-512, 6144 x 1024 in groups
# of 64, a wide weight made and multiplied with: 1.3 ms for 8 rows of bfloat16 and 0.9 by the codes,
# 3.0 and 0.8 for 8 of float32; for 16 rows 1.5 and 1.7, 3.7 and 1.6.
FEW_ROWS = {torch.bfloat16: 12, torch.float16: 32, torch.float32: 32}
# Weights that are wide at one time: 2 MiB in bfloat16, which a core's cache holds.
WIDE_WEIGHTS = 1 << 20


def by_output(form: PackedForm, of_groups: Tensor) -> Tensor:
    """Return [num_groups, n] so that on a CPU the groups of an output lie side by side."""
    if form.device != "cpu":
        return of_groups
    return of_groups.T.contiguous().T


def multiplies(form: PackedForm, dtype: torch.dtype) -> bool:
    """Answer whether the kernels are there and take such a weight."""
    if form.device != "cpu" or form.bits not in (4, 8) or dtype not in FEW_ROWS:
        return False
    in_whole_bytes = form.in_features * form.bits % 8 == 0
    has_whole_words = form.group_size % 8 == 0 or form.group_size == form.in_features
    return in_whole_bytes and has_whole_words and products.is_built()


def write_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, order: Tensor | None
) -> None:
    """Put x W^T + b into `out`; column k of W multiplies input order[k]."""
    rows = x.shape[0]
    if rows <= FEW_ROWS[x.dtype]:
        if rows:
            dense = x if x.stride(1) == 1 else x.contiguous()
            products.write_packed_linear(dense, weight, bias, out, order)
        return
    if order is not None:
        x = x[:, order]
    outputs, inputs = weight.values.shape[0], weight.in_features
    step = max(32, WIDE_WEIGHTS // inputs // 32 * 32)
    wide = x.new_empty(min(step, outputs), inputs)
    for first in range(0, outputs, step):
        span = slice(first, min(first + step, outputs))
        own = wide[: span.stop - first]
        products.write_widened(weight.outputs(span), own)
        out[:, span] = ops.linear(x, own, None if bias is None else bias[span])
