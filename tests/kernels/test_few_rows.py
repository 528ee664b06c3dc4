"""Products of a few rows in Triton against float64, each beside its PyTorch composition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, check, draw, poison
from torch import Tensor

from quire_kernels import ops

pytest.importorskip("triton")
from quire_kernels import few_rows, parts

# Triton's interpreter cuts numbers off where a GPU rounds them to bfloat16.
DTYPES = st.sampled_from(
    [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
)
PLAN = few_rows.plan
ROWS = st.sampled_from([2, 3, 15, 16, 17, 33])
NUM_OUT = st.sampled_from([8, 64, 72, 200])
PLANS = st.sampled_from(
    [
        few_rows.Plan(16, 64, 64, 1, 2),
        few_rows.Plan(32, 64, 64, 2, 2),
        few_rows.Plan(16, 64, 64, 5, 2, prefetch=0),
    ]
)


def weight_of(num_out: int, size: int, dtype: torch.dtype) -> Tensor:
    return (draw(num_out, size, seed=1) * size**-0.5).to(dtype)


@given(ROWS, NUM_OUT, st.sampled_from([64, 320, 512]), DTYPES, st.booleans(), PLANS)
@settings(max_examples=12, deadline=None)
@example(2, 72, 512, torch.float16, True, few_rows.Plan(16, 64, 64, 5, 2))
def test_linear_is_within_the_bound(
    num_rows: int, num_out: int, size: int, dtype: torch.dtype, has_bias: bool, plan: few_rows.Plan
) -> None:
    x, weight = draw(num_rows, size + 8, dtype=dtype)[:, :size], weight_of(num_out, size, dtype)
    bias = draw(num_out, dtype=dtype, seed=2) if has_bias else None
    poison(num_rows, num_out, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "plan", lambda *_, **__: plan)
        out = few_rows.linear(x, weight, bias)
        again = few_rows.linear(x, weight, bias)

    exact = functional.linear(x.double(), weight.double(), bias.double() if has_bias else None)  # type: ignore[union-attr]
    check(out, exact, functional.linear(x, weight, bias))
    assert torch.equal(out, again)


@given(ROWS, NUM_OUT, DTYPES, PLANS)
@settings(max_examples=12, deadline=None)
def test_linear_silu_mul_is_the_composition(
    num_rows: int, num_out: int, dtype: torch.dtype, plan: few_rows.Plan
) -> None:
    x, weight = draw(num_rows, 256, dtype=dtype), weight_of(2 * num_out, 256, dtype)
    poison(num_rows, num_out, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "plan", lambda *_, **__: plan)
        out = few_rows.linear_silu_mul(x, weight)

    gate, up = functional.linear(x.double(), weight.double()).chunk(2, dim=-1)
    plain = ops.linear_silu_mul(x.cpu(), weight.cpu()).to(DEVICE)
    check(out, gate * gate.sigmoid() * up, plain)


def test_a_row_is_the_same_beside_others() -> None:
    x, weight = draw(12, 512, dtype=torch.float16), weight_of(256, 512, torch.float16)

    whole, part = few_rows.linear(x, weight, None), few_rows.linear(x[3:7], weight, None)

    assert torch.equal(whole[3:7], part)


def test_a_nan_stays_in_its_row() -> None:
    x, weight = draw(3, 512, dtype=torch.float16), weight_of(256, 512, torch.float16)
    x[2, 7] = torch.nan

    out = few_rows.linear(x, weight, None)

    assert out.isnan().all(dim=1).tolist() == [False, False, True]


def test_only_some_rows_of_16_bits_are_served() -> None:
    weight = draw(512, 512, dtype=torch.float16)

    assert few_rows.serves(draw(2, 512, dtype=torch.float16), weight)
    assert not few_rows.serves(draw(1, 512, dtype=torch.float16), weight)
    assert not few_rows.serves(draw(few_rows.MAX_ROWS + 1, 512, dtype=torch.float16), weight)
    assert not few_rows.serves(draw(2, 512), weight.float())
    shifted = draw(512 * 512 + 1, dtype=torch.float16)[1:].view(512, 512)
    assert not few_rows.serves(draw(2, 512, dtype=torch.float16), shifted)
    assert not few_rows.serves(draw(2, 512, dtype=torch.float16), weight.T)
    assert not few_rows.serves(draw(2, 520, dtype=torch.float16), draw(512, 520).half())


@given(st.sampled_from([16, 32, 64, 128]), st.integers(1, 200_000), st.integers(1, 40_000))
def test_plans_cut_whole_blocks_and_fit_the_counters(rows: int, num_out: int, size: int) -> None:
    for gated in (False, True):
        plan = PLAN(rows, num_out, size, gated=gated)
        if plan is not None:
            assert size % plan.block == 0
            assert plan.parts <= size // plan.block
            assert -(-num_out // plan.outputs) <= few_rows.MAX_TILES
            tile = (plan.outputs * (2 if gated else 1) + plan.rows) * plan.block * 2
            assert plan.stages * tile <= 220 * 1024


def test_counters_made_within_a_capture_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_COUNTERS", {})
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: draw(4))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda")

    captured = parts.counters(device, 64)

    assert parts.counters(device, 64) is not captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept = parts.counters(device, 64)
    assert parts.counters(device, 64) is kept
    assert parts.counters(device, 128) is not kept
