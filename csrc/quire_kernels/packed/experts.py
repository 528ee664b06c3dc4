"""Weights of experts in a few bits, of which those that are chosen are made wide.

A weight of expert e is (code - zero) * scale, all experts' stacked along the first dimension:

    values   uint8 [num_experts, outputs, ceil(inputs * bits / 8)], rows of codes along the inputs
    scales   float16 [num_experts, groups, outputs]
    zeros    uint8 [num_experts, groups, ceil(outputs * bits / 8)], codes along the outputs
    columns  int32 [num_experts, parts, inputs] or None: which column of values each input is
             multiplied with, of each of `parts` equal parts of the outputs

Codes are a string of bits, the first in the lowest bits of the first byte.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from quire_kernels.with_triton import kernels


@frozen(kw_only=True)
class StackedWeight:
    """What the module says, with the inputs that share a scale."""

    values: Tensor
    scales: Tensor
    zeros: Tensor
    columns: Tensor | None
    bits: int
    group_size: int

    @property
    def num_inputs(self) -> int:
        """Inputs of an expert."""
        return self.scales.shape[1] * self.group_size


def widen(weight: StackedWeight, expert_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return weights of experts in `dtype`, [num_chosen, outputs, inputs] in the inputs' order.

    `expert_ids` int64 [num_chosen]; None: all experts. Nothing is read back to the host.
    """
    if weight.values.is_cuda and (own := kernels("packed.experts_kernel")):
        found: Tensor = own.widen(weight, expert_ids, dtype)
        return found
    return widen_in_pytorch(weight, expert_ids, dtype)


def widen_in_pytorch(
    weight: StackedWeight, expert_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return `widen` in PyTorch; wide in float32 meanwhile."""
    num_experts, num_groups, num_out = weight.scales.shape
    if expert_ids is None:
        expert_ids = torch.arange(num_experts, device=weight.values.device)
    codes = _codes(weight.values[expert_ids], weight.bits, weight.num_inputs)
    zeros = _codes(weight.zeros[expert_ids], weight.bits, num_out).mT.unsqueeze(-1)
    scales = weight.scales[expert_ids].float().mT.unsqueeze(-1)
    wide = codes.unflatten(-1, (num_groups, -1)).sub_(zeros).mul_(scales).flatten(-2).to(dtype)
    if weight.columns is None:
        return wide
    columns = weight.columns[expert_ids].long()
    return wide.gather(-1, columns.repeat_interleave(num_out // columns.shape[1], 1))


def _codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of a string of bits, float32 [.., count]."""
    first = torch.arange(0, count * bits, bits, device=packed.device)
    low = packed[..., first >> 3].int()
    high = packed[..., ((first >> 3) + 1).clamp(max=packed.shape[-1] - 1)].int()
    return ((low | high << 8) >> (first & 7) & (1 << bits) - 1).float()
