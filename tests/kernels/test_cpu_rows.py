"""The C++ norms and activations on a CPU against float64, each beside its PyTorch body."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import check
from torch import Tensor

from quire_kernels import ops, with_cpu
from quire_kernels.cpu import LIBRARY, rows

pytestmark = pytest.mark.skipif(
    LIBRARY.why_unusable() is not None, reason=f"kernels for a CPU: {LIBRARY.why_unusable()}"
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.sampled_from([1, 5, 16, 64, 100, 256, 1000])
ROWS = st.integers(1, 40)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@given(ROWS, SIZES, DTYPES)
@settings(max_examples=40, deadline=None)
def test_rms_norm_is_within_the_bound(num_rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = draw(num_rows, size, dtype=dtype), draw(size, dtype=dtype, seed=1)
    kept = x.clone()

    out = rows.rms_norm(x, weight, 1e-5)

    assert torch.equal(x, kept)
    check(out, norm_formula(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))


@given(ROWS, SIZES, DTYPES)
@settings(max_examples=40, deadline=None)
def test_rms_norm_of_a_sum_leaves_the_sum_in_x(
    num_rows: int, size: int, dtype: torch.dtype
) -> None:
    x, weight = draw(num_rows, size, dtype=dtype), draw(size, dtype=dtype, seed=1)
    residual = draw(num_rows, size, dtype=dtype, seed=2)
    kept, total = residual.clone(), x + residual

    out = rows.rms_norm(x, weight, 1e-5, residual)

    assert torch.equal(x, total)
    assert torch.equal(residual, kept)
    check(out, norm_formula(total, weight, 1e-5), ops.rms_norm(total, weight, 1e-5))


@given(ROWS, SIZES, DTYPES)
@settings(max_examples=40, deadline=None)
def test_silu_mul_takes_the_gate_first(num_rows: int, size: int, dtype: torch.dtype) -> None:
    gate_up = 3 * draw(num_rows, 2 * size, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)

    out = rows.silu_mul(gate_up)

    check(out, functional.silu(gate) * up, ops.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_of_extreme_numbers_are_what_pytorch_says(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([[0.0, -0.0, 90.0, -60.0, 1e-7, inf, nan, 300.0]]).to(dtype)
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=-1)

    torch.testing.assert_close(rows.silu_mul(gate_up), ops.silu_mul(gate_up), equal_nan=True)


def test_norm_of_a_nan_is_nan_in_its_row_alone() -> None:
    x = draw(3, 40, dtype=torch.bfloat16)
    x[1, 7] = float("nan")

    out = rows.rms_norm(x, torch.ones(40, dtype=torch.bfloat16), 1e-6)

    assert out.isnan().all(1).tolist() == [False, True, False]


def test_many_rows_on_several_threads_equal_single_ones() -> None:
    x, weight = draw(3000, 256, dtype=torch.float32), draw(256, dtype=torch.float32, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        many = rows.rms_norm(x, weight, 1e-6)
    finally:
        torch.set_num_threads(before)

    few = [rows.rms_norm(x[i : i + 1], weight, 1e-6) for i in (0, 1500, 2999)]
    assert torch.equal(many[[0, 1500, 2999]], torch.cat(few))


def test_nothing_is_computed_for_no_rows() -> None:
    assert rows.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert rows.silu_mul(torch.empty(0, 8)).shape == (0, 4)


def test_ops_take_the_kernels_where_they_serve_and_pytorch_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(with_cpu, "kernels", lambda: rows)
    monkeypatch.setattr(rows, "rms_norm", lambda *_: taken.append("norm") or torch.zeros(2, 4))
    x, weight = torch.ones(2, 4), torch.ones(4)

    ops.rms_norm(x, weight, 1e-6)
    ops.add_rms_norm(x, x.clone(), weight, 1e-6)
    ops.rms_norm(torch.ones(4, 2).T, weight, 1e-6)
    ops.rms_norm(x.double(), weight.double(), 1e-6)

    assert taken == ["norm", "norm"]


@given(ROWS, SIZES, DTYPES, st.booleans())
@settings(max_examples=40, deadline=None)
def test_quantize_rows_equals_the_body(
    num_rows: int, size: int, dtype: torch.dtype, has_nan: bool
) -> None:
    x = draw(num_rows, size, dtype=dtype)
    x[0] = 0
    if has_nan:
        x[-1, size // 2] = float("nan")

    found = rows.quantize_rows(x)

    # Rows that lie apart are left to the PyTorch body.
    body = ops.quantize_rows(x.repeat(1, 2)[:, :size])
    for one, expected in zip(found, body, strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0, equal_nan=True)
