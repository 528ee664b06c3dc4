"""The Triton kernels of norms and activations against float64, each beside its PyTorch body."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, check, draw, poison
from torch import Tensor

from quire_kernels import ops

pytest.importorskip("triton")
from quire_kernels import activation, norms

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.sampled_from([1, 5, 8, 64, 100, 256, 1000])
ROWS = st.integers(1, 5)


def norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x.cpu(), weight.cpu(), eps).to(x.device)


@given(ROWS, SIZES, DTYPES, st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_rms_norm_is_within_the_bound(
    num_rows: int, size: int, dtype: torch.dtype, extra: int
) -> None:
    # Rows lie apart in memory when there is something beside them.
    x = draw(num_rows, size + extra, dtype=dtype)[:, :size]
    weight = draw(size, dtype=dtype, seed=1)
    poison(num_rows, size, dtype=dtype)

    out = norms.rms_norm(x, weight, 1e-5)

    check(out, norm_formula(x, weight, 1e-5), plain_norm(x, weight, 1e-5))


@given(ROWS, SIZES, DTYPES)
@settings(max_examples=25, deadline=None)
def test_add_rms_norm_is_the_norm_of_the_sum(num_rows: int, size: int, dtype: torch.dtype) -> None:
    x, residual = draw(num_rows, size, dtype=dtype), draw(num_rows, size + 2, dtype=dtype, seed=2)
    residual, kept = residual[:, :size], residual[:, :size].clone()
    weight = draw(size, dtype=dtype, seed=1)
    exact = x.double() + residual.double()
    total = x + residual
    poison(num_rows, size, dtype=dtype)

    out, found = norms.add_rms_norm(x, residual, weight, 1e-5)

    check(found, exact, total)
    assert torch.equal(residual, kept)
    # The norm is that of the sum as it was rounded.
    check(out, norm_formula(found, weight, 1e-5), plain_norm(found, weight, 1e-5))


@pytest.mark.parametrize("size", [24, 128])
def test_many_rows_share_programs_and_equal_single_ones(size: int) -> None:
    x, weight = draw(1027, size), draw(size, seed=1)
    residual = draw(1027, size, seed=2)
    few = [norms.rms_norm(x[i : i + 1], weight, 1e-6) for i in (0, 512, 1026)]

    many = norms.rms_norm(x, weight, 1e-6)
    _, total = norms.add_rms_norm(x.clone(), residual, weight, 1e-6)

    torch.testing.assert_close(many[[0, 512, 1026]], torch.cat(few), rtol=1e-6, atol=1e-6)
    assert torch.equal(total, x + residual)


def test_rms_norm_takes_heads_that_lie_apart() -> None:
    heads = draw(5, 6, 16)[:, 1:4]
    weight = draw(16, seed=1)

    out = norms.rms_norm(heads, weight, 1e-6)

    assert out.shape == heads.shape
    check(out, norm_formula(heads, weight, 1e-6), plain_norm(heads, weight, 1e-6))


def test_rms_norm_of_large_float16_numbers_is_finite() -> None:
    large = torch.full((2, 8), 6e4, dtype=torch.float16, device=DEVICE)

    out = norms.rms_norm(large, torch.ones(8, dtype=torch.float16, device=DEVICE), 1e-6)

    assert out.sub(1).abs().max() < 1e-2


def test_nothing_is_computed_for_no_rows() -> None:
    empty, weight = draw(0, 8), draw(8)

    assert norms.rms_norm(empty, weight, 1e-6).shape == (0, 8)
    assert activation.silu_mul(empty).shape == (0, 4)


@given(ROWS, st.sampled_from([1, 7, 64, 1030]), DTYPES, st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_silu_mul_takes_the_gate_first(
    num_rows: int, size: int, dtype: torch.dtype, extra: int
) -> None:
    gate_up = (draw(num_rows, 2 * size + extra, dtype=dtype) * 3)[:, : 2 * size]
    kept = gate_up.clone()
    gate, up = gate_up.chunk(2, dim=-1)
    poison(num_rows, size, dtype=dtype)

    out = activation.silu_mul(gate_up)

    exact = gate.double() * gate.double().sigmoid() * up.double()
    check(out, exact, gate * gate.sigmoid() * up)
    assert torch.equal(gate_up, kept)


def test_silu_mul_of_large_gates_is_finite() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 1.0]], device=DEVICE)

    assert activation.silu_mul(gate_up).tolist() == [[0.0, 200.0]]


@pytest.mark.parametrize("activate", [activation.silu_mul, activation.gelu_mul])
def test_gate_that_is_very_negative_gives_zero(activate: Any) -> None:
    gate_up = torch.tensor([[-200.0, 3.0]], device=DEVICE)

    assert activate(gate_up).abs().tolist() == [[0.0]]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_with_an_offset_is_rounded_once(offset: float) -> None:
    """In bfloat16 1 + weight loses most of a small weight, and a rounded norm half a digit."""
    x, weight = draw(5, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16, seed=1) / 64
    residual = draw(5, 64, dtype=torch.bfloat16, seed=2)
    exact = norm_formula(x, weight.double() + offset, 1e-5).to(torch.bfloat16)

    out = norms.rms_norm(x, weight, 1e-5, offset=offset)

    # The nearest number, but for those that lie in the middle of two.
    assert (out.cpu() == exact.cpu()).float().mean() > 0.97
    added, total = norms.add_rms_norm(x.clone(), residual, weight, 1e-5, offset=offset)
    assert torch.equal(added, norms.rms_norm(total, weight, 1e-5, offset=offset))
