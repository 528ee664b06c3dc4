"""What norms that round once, GELU of a gate and soft caps give: for the kit of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

Outputs = tuple[Tensor, ...]
CAP = 3.0


def exact_wide_norm(x: Tensor, weight: Tensor, eps: float, options: Any) -> Outputs:
    """Return it in float64."""
    return (_norm(x.double(), weight.double(), eps, options["offset"]),)


def plain_wide_norm(x: Tensor, weight: Tensor, eps: float, options: Any) -> Outputs:
    """Return it in float32, rounded once."""
    return (_norm(x.float(), weight.float(), eps, options["offset"]).to(x.dtype),)


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + weight)


def of_sum(norm: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Return the norm of a sum as it is rounded, and the sum."""

    def found(x: Tensor, y: Tensor, weight: Tensor, eps: float, options: Any) -> Outputs:
        total = x + y if norm is plain_wide_norm else x.double() + y.double()
        return (*norm(x + y, weight, eps, options), total)

    return found


def exact_gelu(gate_up: Tensor) -> Outputs:
    """Return it in float64."""
    gate, up = gate_up.double().chunk(2, -1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return (0.5 * gate * (1 + inner.tanh()) * up,)


def plain_gelu(gate_up: Tensor) -> Outputs:
    """Return PyTorch's."""
    gate, up = gate_up.chunk(2, -1)
    return (functional.gelu(gate, approximate="tanh") * up,)


def exact_cap(x: Tensor, cap: float) -> Outputs:
    """Return it in float64."""
    return plain_cap(x.double(), cap)


def plain_cap(x: Tensor, cap: float) -> Outputs:
    """Return it in the dtype, rounded three times."""
    return (torch.tanh(x / cap) * cap,)
