"""Products with 8-bit and packed weights on a CPU against float64, by each instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import check
from torch import Tensor

from quire_kernels import ops
from quire_kernels.cpu import ISAS, LIBRARY, calls, products

pytestmark = pytest.mark.skipif(
    LIBRARY.why_unusable() is not None, reason=f"kernels for a CPU: {LIBRARY.why_unusable()}"
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ROWS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12, 17])
OUTPUTS = st.sampled_from([1, 2, 5, 15, 16, 17, 64, 70, 96])
# Of one or two sums plain PyTorch's error may be next to nothing by chance.
SOME_OUTPUTS = st.sampled_from([21, 32, 33, 64, 70, 96])
SETTINGS = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True, params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not calls.has_isa(request.param):
        pytest.skip(f"this processor has no {ISAS[request.param]}")
    monkeypatch.setattr(calls, "best_isa", lambda: request.param)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def drawn_int8(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    shape = (outputs, inputs)
    values = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator(1))
    return values, torch.rand(outputs, generator=generator(2)) * 0.01


@given(ROWS, OUTPUTS, st.sampled_from([4, 12, 64, 100, 1024]), DTYPES, st.booleans())
@SETTINGS
def test_product_of_integers_is_within_the_bound(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, has_bias: bool
) -> None:
    values, scales = drawn_int8(outputs, inputs)
    bias = draw(outputs, dtype=dtype, seed=3) if has_bias else None
    x = draw(rows, inputs, dtype=dtype)
    rounded, x_scales = ops.quantize_rows(x)
    seen = (rounded.double() - 128) * x_scales.double()[:, None]
    exact = seen @ (values.double() * scales.double()[:, None]).T
    plain = (rounded.float() - 128) @ values.float().T * x_scales[:, None] * scales
    if bias is not None:
        exact, plain = exact + bias.double(), plain + bias

    out = products.int8_linear(x, products.int8_tiles(values), scales, bias)

    check(out, exact, plain.to(dtype))


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_sums_of_the_largest_integers_are_exact(rows: int) -> None:
    inputs = 65536
    values = torch.full((16, inputs), -128, dtype=torch.int8)
    x = torch.full((rows, inputs), 255, dtype=torch.uint8)
    tiles = products.int8_tiles(values)

    out = products.int8_product(x, torch.ones(rows), tiles, torch.ones(16))

    assert torch.equal(out, torch.full((rows, 16), -128.0 * 127 * inputs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_that_is_not_finite_is_nan_and_others_are_not(bad: float) -> None:
    values, scales = drawn_int8(32, 64)
    x = draw(3, 64, dtype=torch.bfloat16)
    x[1, 5] = bad

    out = products.int8_linear(x, products.int8_tiles(values), scales, None)

    assert out.isnan().all(1).tolist() == [False, True, False]
    assert not out[::2].isnan().any()


@pytest.mark.parametrize("outputs", [1, 16, 40, 4000])
def test_values_come_back_from_tiles(outputs: int) -> None:
    values, _ = drawn_int8(outputs, 700)

    tiles = products.int8_tiles(values)

    assert torch.equal(products.int8_values(tiles, outputs), values)


def drawn_packed(
    outputs: int, inputs: int, group: int, bits: int, *, by_output: bool
) -> tuple[products.PackedWeight, Tensor]:
    """Return a weight and what it stands for, float64."""
    top = 2**bits
    codes = torch.randint(0, top, (outputs, inputs), dtype=torch.uint8, generator=generator(4))
    shape = (inputs // group, outputs + outputs % 2)
    zeros = torch.randint(0, top, shape, dtype=torch.uint8, generator=generator(5))
    scales = (torch.rand(inputs // group, outputs, generator=generator(6)) * 0.01).half()
    distance = codes.double().unflatten(1, (-1, group)) - zeros.T[:outputs].double()[..., None]
    wide = (distance * scales.T.double()[..., None]).flatten(1)
    if bits == 4:
        codes, zeros = (c[:, ::2] | c[:, 1::2] << 4 for c in (codes, zeros))
    if by_output:
        scales, zeros = scales.T.contiguous().T, zeros.T.contiguous().T
    weight = products.PackedWeight(
        values=codes, scales=scales, zeros=zeros, bits=bits, group_size=group
    )
    return weight, wide


# Inputs and groups: parts of a vector, whole vectors, several a vector, and what fits none.
WHOLE = ((128, 128), (512, 128), (384, 192), (1000, 1000), (200, 200), (64, 64), (8, 8))
PARTS = ((256, 64), (256, 32), (256, 16), (200, 8), (72, 24), (96, 48), (320, 64), (320, 32))
FORMS = st.sampled_from((*WHOLE, *PARTS))


@given(ROWS, SOME_OUTPUTS, FORMS, st.sampled_from([4, 8]), DTYPES, st.booleans(), st.booleans())
@SETTINGS
def test_product_with_codes_is_within_the_bound(
    rows: int,
    outputs: int,
    form: tuple[int, int],
    bits: int,
    dtype: torch.dtype,
    has_order: bool,
    by_output: bool,
) -> None:
    weight, wide = drawn_packed(outputs, *form, bits, by_output=by_output)
    order = torch.randperm(form[0], generator=generator(7)).int() if has_order else None
    bias = draw(outputs, dtype=dtype, seed=3)
    x = draw(rows, 2 * form[0], dtype=dtype)[:, form[0] :]
    seen = x if order is None else x[:, order]
    exact = seen.double() @ wide.T + bias.double()
    plain = torch.nn.functional.linear(seen, wide.to(dtype), bias)
    # Cut from wider rows.
    out = torch.full((rows, outputs + 6), float("nan"), dtype=dtype)

    products.write_packed_linear(x, weight, bias, out[:, 3:-3], order)

    check(out[:, 3:-3], exact, plain)
    assert out[:, :3].isnan().all()
    assert out[:, -3:].isnan().all()


@given(OUTPUTS, FORMS, st.sampled_from([4, 8]), DTYPES, st.booleans())
@SETTINGS
def test_wide_weight_is_the_nearest(
    outputs: int, form: tuple[int, int], bits: int, dtype: torch.dtype, by_output: bool
) -> None:
    weight, wide = drawn_packed(outputs, *form, bits, by_output=by_output)
    out = torch.full((outputs, form[0]), float("nan"), dtype=dtype)

    products.write_widened(weight, out)

    assert torch.equal(out, wide.float().to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_some_outputs_are_those_of_the_whole(bits: int) -> None:
    weight, _ = drawn_packed(64, 256, 64, bits, by_output=True)
    x = draw(2, 256, dtype=torch.float32)
    whole, part = torch.empty(2, 64), torch.empty(2, 24)

    products.write_packed_linear(x, weight, None, whole)
    products.write_packed_linear(x, weight.outputs(slice(8, 32)), None, part)

    assert torch.equal(part, whole[:, 8:32])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    weight, _ = drawn_packed(4096, 256, 64, 4, by_output=True)
    values, scales = drawn_int8(4096, 1024)
    tiles = products.int8_tiles(values)
    x, y = draw(3, 256, dtype=torch.bfloat16), draw(3, 1024, dtype=torch.bfloat16)
    kept = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            out = torch.empty(3, 4096, dtype=x.dtype)
            products.write_packed_linear(x, weight, None, out)
            found.append((out, products.int8_linear(y, tiles, scales, None)))
    finally:
        torch.set_num_threads(kept)

    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
