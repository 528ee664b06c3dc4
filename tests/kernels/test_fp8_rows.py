"""Rounding to e4m3 in Triton: the bits of the PyTorch bodies, whatever makes the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, draw
from torch import Tensor

from quire_kernels import fp8
from quire_kernels.fp8 import E4M3, Scaling

pytest.importorskip("triton")
from quire_kernels import fp8_rows

EPS = 1e-5
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SIZES = st.sampled_from([1, 16, 96, 300, 512])
SCALINGS = st.sampled_from(
    [
        Scaling(),
        Scaling(group=32),
        Scaling(group=128),
        Scaling(largest=0.7),
        Scaling(given=torch.tensor([0.013])),
        Scaling(given=torch.tensor([3.0])),
    ]
)


def by_kernel(x: Tensor, size: int, scaling: Scaling, **source: Any) -> tuple[Tensor, Tensor]:
    values = torch.full((x.shape[0], size), 2.0, device=DEVICE).to(E4M3)
    groups = -(-size // scaling.group) if scaling.group else 1
    scales = torch.full((x.shape[0], groups), float("nan"), device=DEVICE)
    given_scale = None if scaling.given is None else scaling.given.to(DEVICE)
    keys = {"group": scaling.group, "largest": scaling.largest, "given": given_scale}
    fp8_rows.quantize(x, (values, scales), **keys, **source)
    return values.cpu(), (scales if given_scale is None else given_scale.view(1, 1)).cpu()


def check_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))


def rows_of(num_rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Draw rows of very different sizes, one of which is zero; on the CPU."""
    x = draw(num_rows, size, seed=seed).cpu() * 10.0 ** torch.arange(num_rows)[:, None].fmod(4)
    x[num_rows // 2] = 0
    return x.to(dtype)


@given(st.integers(1, 5), SIZES, DTYPES, SCALINGS, st.booleans())
@settings(max_examples=30, deadline=None)
def test_rows_are_those_of_the_plain_body(
    num_rows: int, size: int, dtype: torch.dtype, scaling: Scaling, strided: bool
) -> None:
    x = rows_of(num_rows, size + 8 * strided, dtype)[:, :size]

    found = by_kernel(x.to(DEVICE), size, scaling)

    check_equal(found, fp8.quantize(x, scaling))


@given(st.integers(1, 3), SIZES, DTYPES, SCALINGS)
@settings(max_examples=20, deadline=None)
def test_gated_rows_are_those_of_the_steps(
    num_rows: int, size: int, dtype: torch.dtype, scaling: Scaling
) -> None:
    gate_up = draw(num_rows, 2 * size, seed=1).cpu().to(dtype)

    found = by_kernel(gate_up.to(DEVICE), size, scaling, gated=True)

    check_near(found, fp8.silu_mul_quantize(gate_up, scaling))


@given(st.integers(1, 3), SIZES, DTYPES, SCALINGS)
@settings(max_examples=20, deadline=None)
def test_normed_rows_are_those_of_the_steps(
    num_rows: int, size: int, dtype: torch.dtype, scaling: Scaling
) -> None:
    x, residual = rows_of(num_rows, size, dtype, 2), rows_of(num_rows, size, dtype, 3)
    weight, device_x = draw(size, seed=4).cpu().to(dtype), x.clone().to(DEVICE)
    kept = residual.clone().to(DEVICE)

    norm = kept, weight.to(DEVICE), EPS
    found = by_kernel(device_x, size, scaling, norm=norm)

    expected, total = fp8.add_rms_norm_quantize(x.clone(), residual, weight, EPS, scaling)
    assert torch.equal(device_x.cpu(), total)
    assert torch.equal(kept.cpu(), residual)
    check_near(found, expected)


def check_near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Fail beyond one number of e4m3: a norm or SiLU may fall between two of the row's dtype."""
    assert torch.allclose(found[1], expected[1], rtol=2**-7, atol=0)
    codes = [pair[0].view(torch.int8).short() for pair in (found, expected)]
    both_zero = (codes[0] & 0x7F == 0) & (codes[1] & 0x7F == 0)
    distance = (codes[0] - codes[1]).abs().masked_fill(both_zero, 0)
    assert distance.max() <= 1
    assert (distance > 0).float().mean() <= 0.05


def test_every_number_of_16_bits_is_rounded_to_the_nearest() -> None:
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    x = codes.nan_to_num(1.0, 1.0, 1.0).view(64, 1024)
    one = Scaling(given=torch.ones(1))

    check_equal(by_kernel(x.to(DEVICE), 1024, one), fp8.quantize(x, one))


def test_nan_stays_in_its_place_and_its_row() -> None:
    x = draw(3, 64)
    x[1, 5] = float("nan")

    values, scales = by_kernel(x, 64, Scaling())

    assert values.float().isnan().nonzero().tolist() == [[1, 5]]
    assert bool(scales.isfinite().all())


@pytest.mark.parametrize(
    ("size", "group", "served"),
    [(512, None, True), (512, 128, True), (512, 48, False), (1 << 16, None, False)],
)
def test_rows_that_fit_and_groups_of_powers_of_two_are_served(
    size: int, group: int | None, served: bool
) -> None:
    assert fp8_rows.serves(draw(1, 8), size, group) is served
