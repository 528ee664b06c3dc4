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

# Up to so many rows codes are multiplied as they are, of 4 bits and of 8. One core with AVX-512,
# 6144 x 1024, microseconds by the codes, and for a wide weight and the product with it: bfloat16 in
# groups of 128, 8 rows 810 and 1,195, 12 rows 1,249 and 1,282; of 8 bits, 4 rows 577 and 1,322, 8
# rows 1,412 and 1,471; float32, 8 rows 770 and 3,000, 16 rows 1,600 and 3,700.
FEW_ROWS = {
    torch.bfloat16: {4: 12, 8: 6},
    torch.float16: {4: 32, 8: 32},
    torch.float32: {4: 32, 8: 32},
}
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
    if rows <= FEW_ROWS[x.dtype][weight.bits]:
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
