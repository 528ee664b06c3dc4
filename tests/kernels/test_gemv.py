"""One-row products in Triton against float64, each beside its PyTorch composition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, check, draw, poison
from torch import Tensor

from quire_kernels import ops

pytest.importorskip("triton")
from quire_kernels import gemv

# Triton's interpreter cuts numbers off where a GPU rounds them to bfloat16.
DTYPES = st.sampled_from(
    [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
)
PLAN = gemv.plan
NUM_OUT = st.sampled_from([3, 4, 9, 16])
SIZES = st.sampled_from([8, 96, 256, 600])
EPS = 1e-5


@pytest.fixture(autouse=True, scope="module")
def small_plan() -> Iterator[None]:
    """Give every product a plan, of few outputs and short blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemv, "plan", lambda num_out, size, *, gated=False: (4, 256, 4))
        yield


def weight_of(num_out: int, size: int, dtype: torch.dtype) -> Tensor:
    return (draw(num_out, size, seed=1) * size**-0.5).to(dtype)


def normed_exactly(total: Tensor, norm_weight: Tensor) -> Tensor:
    wide = total.double()
    return wide / (wide.square().mean() + EPS).sqrt() * norm_weight.double()


def silu_mul_exactly(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


@given(NUM_OUT, SIZES, DTYPES, st.booleans(), st.integers(0, 1))
@settings(max_examples=12, deadline=None)
def test_linear_is_within_the_bound(
    num_out: int, size: int, dtype: torch.dtype, has_bias: bool, extra: int
) -> None:
    x, weight = draw(1, size, dtype=dtype), weight_of(num_out, size + 8 * extra, dtype)[:, :size]
    bias = draw(num_out, dtype=dtype, seed=2) if has_bias else None
    poison(1, num_out, dtype=dtype)

    out = gemv.linear(x, weight, bias)

    exact = functional.linear(x.double(), weight.double(), bias.double() if has_bias else None)  # type: ignore[union-attr]
    check(out, exact, functional.linear(x, weight, bias))


@given(NUM_OUT, SIZES, DTYPES, st.booleans())
@settings(max_examples=12, deadline=None)
def test_add_rms_norm_linear_is_the_composition(
    num_out: int, size: int, dtype: torch.dtype, has_bias: bool
) -> None:
    x, residual = draw(1, size, dtype=dtype), draw(1, size, dtype=dtype, seed=3)
    norm_weight, weight = draw(size, dtype=dtype, seed=4), weight_of(num_out, size, dtype)
    bias = draw(num_out, dtype=dtype, seed=2) if has_bias else None
    kept = x.clone(), residual.clone()
    poison(1, num_out, dtype=dtype)

    out, total = gemv.add_rms_norm_linear(x, residual, norm_weight, EPS, weight, bias)

    assert torch.equal(total, x + residual)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])
    exact = functional.linear(
        normed_exactly(total, norm_weight),
        weight.double(),
        bias.double() if bias is not None else None,
    )
    plain = ops.add_rms_norm_linear(
        *(t.cpu() for t in (x, residual, norm_weight)),
        EPS,
        weight.cpu(),
        bias.cpu() if bias is not None else None,
    )[0]
    check(out, exact, plain.to(DEVICE))


@given(NUM_OUT, SIZES, DTYPES)
@settings(max_examples=12, deadline=None)
def test_linear_silu_mul_is_the_composition(num_out: int, size: int, dtype: torch.dtype) -> None:
    x, weight = draw(1, size, dtype=dtype), weight_of(2 * num_out, size, dtype)
    poison(1, num_out, dtype=dtype)

    out = gemv.linear_silu_mul(x, weight)

    exact = silu_mul_exactly(functional.linear(x.double(), weight.double()))
    check(out, exact, ops.linear_silu_mul(x.cpu(), weight.cpu()).to(DEVICE))


@given(NUM_OUT, SIZES, DTYPES)
@settings(max_examples=12, deadline=None)
def test_add_rms_norm_linear_silu_mul_is_the_composition(
    num_out: int, size: int, dtype: torch.dtype
) -> None:
    x, residual = draw(1, size, dtype=dtype), draw(1, size, dtype=dtype, seed=3)
    norm_weight, weight = draw(size, dtype=dtype, seed=4), weight_of(2 * num_out, size, dtype)
    poison(1, num_out, dtype=dtype)

    out, total = gemv.add_rms_norm_linear_silu_mul(x, residual, norm_weight, EPS, weight)

    assert torch.equal(total, x + residual)
    normed = normed_exactly(total, norm_weight)
    exact = silu_mul_exactly(functional.linear(normed, weight.double()))
    plain = ops.add_rms_norm_linear_silu_mul(
        *(t.cpu() for t in (x, residual, norm_weight)), EPS, weight.cpu()
    )[0]
    check(out, exact, plain.to(DEVICE))


def test_bfloat16_differs_by_no_more_than_its_roundings() -> None:
    x, weight = draw(1, 512, dtype=torch.bfloat16), weight_of(20, 512, torch.bfloat16)

    out = gemv.linear(x, weight, None)

    exact = functional.linear(x.double(), weight.double())
    assert (out.double() - exact).abs().max() <= torch.finfo(out.dtype).eps * exact.abs().max()


def test_only_one_row_of_16_bits_is_served() -> None:
    weight = draw(512, 64, dtype=torch.float16)

    assert gemv.serves(draw(1, 64, dtype=torch.float16), weight)
    assert not gemv.serves(draw(2, 64, dtype=torch.float16), weight)
    assert not gemv.serves(draw(1, 64), weight.float())
    assert not gemv.serves(draw(1, 512, dtype=torch.float16), weight.T)


@given(st.integers(1, 200_000), st.integers(1, 40_000), st.booleans())
def test_plans_are_powers_of_two_that_cover_the_columns(
    num_out: int, size: int, gated: bool
) -> None:
    chosen = PLAN(num_out, size, gated=gated)

    if chosen is not None:
        outputs, block, warps = chosen
        assert all(n & (n - 1) == 0 for n in chosen)
        assert block % 8 == 0
        # The loop over columns is unrolled.
        assert -(-size // block) <= 16
        assert outputs * block // (32 * warps) <= 64
