"""Products with weights in e4m3 in Triton against float64, and what they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attrs import evolve, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, check, draw, poison
from torch import Tensor

from quire_kernels import fp8
from quire_kernels.fp8 import Matrix, Scaling

pytest.importorskip("triton")
from quire_kernels import fp8_gemm, fp8_gemv

DTYPES = st.sampled_from([torch.float16, torch.bfloat16])
PLANS = {"gemv": fp8_gemv.plan, "gemm": fp8_gemm.plan}
BLOCK = (128, 128)
BY_ROW = Scaling()


@pytest.fixture(autouse=True, scope="module")
def small_plans() -> Iterator[None]:
    """Give every product small tiles, so that it has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_gemv, "plan", lambda num_out, size: (4, 256, 4))
        yield


@frozen
class Case:
    """Rows, a weight, and what they stand for in float64."""

    x: Tensor
    x_scales: Tensor | None
    weight: Matrix
    exact: Tensor
    plain: Tensor
    bias: Tensor | None


def make(
    num_rows: int,
    num_out: int,
    size: int,
    dtype: torch.dtype,
    *,
    block: tuple[int, int] | None = None,
    scaling: Scaling | None = BY_ROW,
    has_bias: bool = False,
) -> Case:
    x = draw(num_rows, size, dtype=dtype)
    values, scales = fp8.quantize((draw(num_out, size, seed=1) * size**-0.5).cpu(), Scaling())
    wide = values.double() * scales.double()
    if block is not None:
        counts = -(-num_out // block[0]), -(-size // block[1])
        scales = draw(*counts, seed=5).cpu().abs() * 0.01
        spread = scales.repeat_interleave(block[0], 0)[:num_out]
        wide = values.double() * spread.repeat_interleave(block[1], 1)[:, :size].double()
    seen, x_scales, given_x = x.cpu().double(), None, x
    if scaling is not None:
        rounded = fp8.quantize(x.cpu(), scaling)
        spread = rounded[1] if scaling.group is None else rounded[1].repeat_interleave(128, 1)
        seen = rounded[0].double() * spread[:, :size].double()
        given_x, x_scales = rounded[0].to(DEVICE), rounded[1].to(DEVICE)
    bias = draw(num_out, dtype=dtype, seed=2) if has_bias else None
    exact = seen @ wide.T + (0 if bias is None else bias.cpu().double())
    plain = (seen.float() @ wide.float().T + (0 if bias is None else bias.cpu().float())).to(dtype)
    weight = Matrix(
        values=values.to(DEVICE), scales=scales.to(DEVICE), sizes=(num_out,), block=block
    )
    return Case(given_x, x_scales, weight, exact.to(DEVICE), plain.to(DEVICE), bias)


def by_gemv(case: Case) -> Tensor:
    out = torch.full_like(case.plain, float("nan"))
    scales = case.x_scales, case.weight.scales
    keys = {"bias": case.bias, "block": case.weight.block}
    fp8_gemv.linear(case.x, case.weight.values, scales, out, **keys)
    return out


def by_gemm(case: Case, plan: fp8_gemm.Plan | None = None) -> Tensor:
    out = torch.full_like(case.plain, float("nan"))
    assert case.x_scales is not None
    poison(2, *out.shape)
    scales = case.x_scales, case.weight.scales
    keys = {"bias": case.bias, "block": case.weight.block, "chosen": plan}
    fp8_gemm.linear(case.x, case.weight.values, scales, out, **keys)
    return out


ROW_SCALINGS = st.sampled_from([None, Scaling(), Scaling(given=torch.tensor([0.02]))])


@given(st.sampled_from([3, 8, 70]), st.sampled_from([16, 256, 272, 1008]), DTYPES, ROW_SCALINGS)
@settings(max_examples=20, deadline=None)
def test_one_row_is_within_the_bound(
    num_out: int, size: int, dtype: torch.dtype, scaling: Scaling | None
) -> None:
    case = make(1, num_out, size, dtype, scaling=scaling, has_bias=num_out > 3)

    check(by_gemv(case), case.exact, case.plain)


@given(st.sampled_from([40, 130]), st.sampled_from([128, 384, 432]), DTYPES, st.booleans())
@settings(max_examples=12, deadline=None)
def test_one_row_takes_blocks(num_out: int, size: int, dtype: torch.dtype, rounds: bool) -> None:
    scaling = Scaling(group=128) if rounds else None
    case = make(1, num_out, size, dtype, block=BLOCK, scaling=scaling)

    check(by_gemv(case), case.exact, case.plain)


@given(
    st.sampled_from([1, 2, 16, 17, 40]),
    st.sampled_from([64, 70, 200]),
    st.sampled_from([256, 640, 1024]),
    DTYPES,
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_some_rows_are_within_the_bound(
    num_rows: int, num_out: int, size: int, dtype: torch.dtype, has_bias: bool
) -> None:
    case = make(num_rows, num_out, size, dtype, has_bias=has_bias)

    check(by_gemm(case), case.exact, case.plain)


@given(st.sampled_from([1, 3, 33]), st.sampled_from([64, 200]), st.sampled_from([128, 384]), DTYPES)
@settings(max_examples=12, deadline=None)
def test_some_rows_take_blocks(num_rows: int, num_out: int, size: int, dtype: torch.dtype) -> None:
    case = make(num_rows, num_out, size, dtype, block=BLOCK, scaling=Scaling(group=128))

    check(by_gemm(case), case.exact, case.plain)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("grouped", [1, 2])
def test_tiles_and_parts_cover_the_product_and_leave_no_count(parts: int, grouped: int) -> None:
    case = make(70, 200, 1024, torch.float16, has_bias=True)
    plan = fp8_gemm.Plan(16, 64, 128, parts, 2, grouped=grouped)

    first, again = by_gemm(case, plan), by_gemm(case, plan)

    check(first, case.exact, case.plain)
    assert torch.equal(first, again)


def test_one_scale_serves_all_rows() -> None:
    case = make(20, 64, 256, torch.float16, scaling=Scaling(given=torch.tensor([0.02])))

    assert case.x_scales is not None
    assert case.x_scales.shape == (1, 1)
    check(by_gemm(case), case.exact, case.plain)


@given(st.integers(1, 40_000), st.integers(1, 200_000), st.integers(1, 500), st.booleans())
def test_plans_cover_the_columns(
    num_rows: int, num_out: int, blocks: int, has_blocks: bool
) -> None:
    size = 128 * blocks
    rows = fp8_gemm.padded(num_rows)
    chosen = PLANS["gemm"](rows, num_out, size, block=BLOCK if has_blocks else None)

    if chosen is not None:
        assert size % chosen.block == 0
        assert chosen.parts <= size // chosen.block
        # What is prefetched lies within a row of the weight.
        assert chosen.parts == 1 or chosen.prefetch % 16 == 0
        tile = (chosen.rows + chosen.outputs) * chosen.block * chosen.stages
        assert tile <= 227 * 1024
    one = PLANS["gemv"](num_out, 16 * blocks)
    if one is not None:
        assert all(n & (n - 1) == 0 for n in one)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernels on any device."""
    monkeypatch.setattr(fp8, "computes_e4m3", lambda device: True)
    monkeypatch.setattr(fp8, "has_room_for_tiles", lambda device: True)


def asked(case: Case) -> Tensor | None:
    return fp8.product(case.x, case.x_scales, case.weight, case.bias, case.plain.dtype)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("block", [None, BLOCK])
def test_product_is_made_by_a_kernel(num_rows: int, block: tuple[int, int] | None) -> None:
    scaling = Scaling(group=128 if block else None)
    case = make(num_rows, 128, 256, torch.float16, block=block, scaling=scaling)

    found = asked(case)

    assert found is not None
    check(found, case.exact, case.plain)


@pytest.mark.usefixtures("everywhere")
def test_product_is_left_to_others_where_no_kernel_takes_it() -> None:
    served = make(5, 256, 256, torch.float16, block=BLOCK, scaling=Scaling(group=128))
    odd = make(5, 256, 24, torch.float16)
    split = evolve(served, weight=evolve(served.weight, sizes=(100, 156)))
    by_row = make(5, 256, 256, torch.float16, block=BLOCK)

    assert asked(served) is not None
    assert [asked(case) for case in (odd, split, by_row)] == [None, None, None]


@pytest.mark.usefixtures("everywhere")
def test_tiles_need_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "has_room_for_tiles", lambda device: False)

    assert asked(make(5, 128, 256, torch.float16)) is None
    assert asked(make(1, 128, 256, torch.float16)) is not None


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("num_rows", "few"), [(64, True), (65, False)])
def test_many_rows_in_bfloat16_are_left_to_pytorch(num_rows: int, few: bool) -> None:
    x = torch.zeros(num_rows, 256, device=DEVICE).to(fp8.E4M3)
    weight = torch.zeros(fp8_gemm.WIDE_OUT + 16, 256, device=DEVICE).to(fp8.E4M3)

    assert fp8_gemm.serves(x, weight, torch.bfloat16, None) is few
    assert fp8_gemm.serves(x, weight, torch.float16, None)
    assert fp8_gemm.serves(x, weight[:4096], torch.bfloat16, None)


def test_nothing_is_made_by_kernels_on_a_cpu() -> None:
    case = make(1, 64, 256, torch.float16)
    on_cpu = evolve(case.weight, values=case.weight.values.cpu(), scales=case.weight.scales.cpu())

    assert fp8.product(case.x.cpu(), None, on_cpu, None, torch.float16) is None
