"""Rows and products of 8-bit integers in Triton: the plain bodies' bits, and float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, check, draw
from torch import Tensor

from quire_kernels import int8, ops

pytest.importorskip("triton")
from quire_kernels import fp8_gemm, fp8_gemv, fp8_rows

EPS = 1e-5
DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True, scope="module")
def small_plans() -> Iterator[None]:
    """Give products of one row small tiles, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_gemv, "plan", lambda num_out, size: (4, 256, 4))
        yield


def by_kernel(x: Tensor, size: int, **source: object) -> int8.Rounded:
    values = torch.full((x.shape[0], size), 77, dtype=torch.int8, device=DEVICE)
    scales = torch.full((x.shape[0], 1), float("nan"), device=DEVICE)
    fp8_rows.quantize(x, (values, scales), **source)  # type: ignore[arg-type]
    return values.cpu(), scales.cpu()


def formula(x: Tensor) -> int8.Rounded:
    """Round as `ops.quantize_rows` says, whatever the device."""
    wide = x.cpu().float()
    largest = wide.abs().amax(1, keepdim=True)
    scales = torch.where(largest == 0, 1.0, largest / 127)
    is_finite = wide.isfinite().all(1, keepdim=True)
    values = torch.where(is_finite, wide / scales, 0.0).round().clamp(-127, 127).to(torch.int8)
    return values, torch.where(is_finite, scales, torch.nan)


def check_equal(found: int8.Rounded, expected: int8.Rounded) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)


@given(
    st.integers(1, 5),
    st.sampled_from([1, 16, 96, 300, 512]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([None, float("nan"), float("inf"), -float("inf")]),
)
@settings(max_examples=30, deadline=None)
def test_rows_are_those_of_the_formula(
    num_rows: int, size: int, dtype: torch.dtype, bad: float | None
) -> None:
    x = (draw(num_rows, size + 8) * 10.0 ** torch.arange(num_rows)[:, None].fmod(4).to(DEVICE)).to(
        dtype
    )[:, :size]
    x[num_rows // 2] = 0
    if bad is not None:
        x[0, size // 2] = bad

    check_equal(by_kernel(x, size), formula(x))


@given(st.integers(1, 3), st.sampled_from([16, 300, 512]), DTYPES)
@settings(max_examples=20, deadline=None)
def test_rows_behind_a_norm_and_silu_are_those_of_the_steps(
    num_rows: int, size: int, dtype: torch.dtype
) -> None:
    x, residual = draw(num_rows, size, dtype=dtype), draw(num_rows, size, dtype=dtype, seed=1)
    norm, gate_up = draw(size, dtype=dtype, seed=2), draw(num_rows, 2 * size, dtype=dtype, seed=3)
    (values, scales), total = int8.add_rms_norm_quantize(x.clone(), residual.clone(), norm, EPS)
    kept = x.clone()

    normed = by_kernel(kept, size, norm=(residual, norm, EPS))
    gated = by_kernel(gate_up, size, gated=True)

    assert torch.equal(kept, total)
    for found, expected in (
        (normed, (values.cpu(), scales.cpu())),
        (gated, [part.cpu() for part in int8.silu_mul_quantize(gate_up)]),
    ):
        # Sums of squares and exponentials may differ in their last bit.
        assert (found[0].int() - expected[0].int()).abs().max() <= 1
        torch.testing.assert_close(found[1], expected[1], rtol=2**-7, atol=0)


@given(
    st.sampled_from([1, 2, 16, 70, 200]),
    st.sampled_from([64, 128, 200]),
    st.sampled_from([128, 256, 512]),
    DTYPES,
    st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_products_are_within_the_bound(
    num_rows: int, num_out: int, size: int, dtype: torch.dtype, has_bias: bool
) -> None:
    weight = torch.randint(-127, 128, (num_out, size), dtype=torch.int8).to(DEVICE)
    scales = (torch.rand(num_out) * 0.01).to(DEVICE)
    bias = draw(num_out, dtype=dtype, seed=3) if has_bias else None
    values, x_scales = formula(draw(num_rows, size, dtype=dtype))
    values, x_scales = values.to(DEVICE), x_scales.to(DEVICE)
    exact = values.double() * x_scales.double() @ (weight.double() * scales.double()[:, None]).T
    plain = values.float() @ weight.float().T * scales * x_scales
    if bias is not None:
        exact, plain = exact + bias.double(), plain + bias.float()
    out = torch.full((num_rows, num_out), float("nan"), dtype=dtype, device=DEVICE)

    kernels = fp8_gemv if num_rows == 1 else fp8_gemm
    kernels.linear(values, weight, (x_scales, scales), out, bias=bias)

    check(out, exact, plain.to(dtype))


@given(st.sampled_from([64, 200]), st.sampled_from([128, 512]))
@settings(max_examples=8, deadline=None)
def test_row_alone_has_the_bits_that_it_has_among_others(num_out: int, size: int) -> None:
    weight = torch.randint(-127, 128, (num_out, size), dtype=torch.int8).to(DEVICE)
    scales = torch.rand(num_out).to(DEVICE)
    values, x_scales = (part.to(DEVICE) for part in formula(draw(3, size)))
    # Sums of integers are exact, so that only the order of the scales can tell kernels apart.
    plain = (values.double() @ weight.double().T).float() * scales * x_scales
    out = torch.full((3, num_out), float("nan"), device=DEVICE)

    for row in range(3):
        own = slice(row, row + 1)
        fp8_gemv.linear(values[own], weight, (x_scales[own], scales), out[own])

    assert torch.equal(out, plain)


def test_large_tiles_are_within_the_bound() -> None:
    plan = fp8_gemm.plan(2048, 4096, 14336, is_integer=True)
    assert plan == fp8_gemm.Plan(256, 128, 128, 1, 3, warps=8, grouped=4)
    weight = torch.randint(-127, 128, (200, 256), dtype=torch.int8).to(DEVICE)
    scales = torch.rand(200).to(DEVICE)
    values, x_scales = (part.to(DEVICE) for part in formula(draw(300, 256)))
    exact = values.double() * x_scales.double() @ (weight.double() * scales.double()[:, None]).T
    out = torch.full((300, 200), float("nan"), dtype=torch.bfloat16, device=DEVICE)

    fp8_gemm.linear(values, weight, (x_scales, scales), out, chosen=plan)

    check(out, exact, exact.to(out.dtype))


def test_plain_rounding_is_that_of_quantize_rows() -> None:
    x = draw(3, 64)
    values, scales = ops.quantize_rows(x)

    found = int8.quantize(x)

    assert torch.equal(found[0].int(), values.int() - 128)
    assert torch.equal(found[1][:, 0], scales)
