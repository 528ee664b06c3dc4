"""SiLU and GELU of a gate, and soft caps: bodies of `quire_kernels.ops`, without Triton."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from quire_kernels import fixed_rows, with_cpu
from quire_kernels.with_triton import kernels as triton_kernels

_tanh_gelu = partial(functional.gelu, approximate="tanh")


def silu_mul(gate_up: Tensor, *, batch_invariant: bool = False) -> Tensor:
    """Return silu(gate) * up of `gate_up` [num_tokens, 2 * size], gate first: [num_tokens, size].

    `batch_invariant`, here and below: a row has the same bits however many there are.
    Source: Shazeer, "GLU variants improve transformer", 2020.
    """
    if gate_up.is_cuda and (kernels := triton_kernels("activation")):
        out: Tensor = kernels.silu_mul(gate_up)
        return out
    if gate_up.is_cpu and (rows := with_cpu.kernels()) and rows.serves(gate_up):
        out = rows.silu_mul(gate_up)
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    if batch_invariant:
        return fixed_rows.apart_from_threads(functional.silu, gate).mul_(up)
    return functional.silu(gate).mul_(up)


def gelu_mul(gate_up: Tensor, *, batch_invariant: bool = False) -> Tensor:
    """Return gelu(gate) * up of `gate_up` [num_tokens, 2 * size], gate first: [num_tokens, size].

    GELU is its approximation by tanh.
    Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016.
    """
    if gate_up.is_cuda and (kernels := triton_kernels("activation")):
        out: Tensor = kernels.gelu_mul(gate_up)
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    if batch_invariant:
        return fixed_rows.apart_from_threads(_tanh_gelu, gate).mul_(up)
    return _tanh_gelu(gate).mul_(up)


def soft_cap(x: Tensor, cap: float, *, batch_invariant: bool = False) -> Tensor:
    """Return cap * tanh(x / cap) of `x` [num_rows, size], made in its memory."""
    x.div_(cap)
    if batch_invariant and x.is_cpu:
        return fixed_rows.apart_from_threads(torch.tanh, x).mul_(cap)
    return x.tanh_().mul_(cap)
