"""The kit knows operations by name, catches broken ones, and says what it has no formula for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor
from torch.nn import functional

from quire.testing import OpsTests, check_ops
from quire.testing.kit_ops import Op, OpCase
from quire.testing.kit_report import PROFILES

# As many cases on a slow machine as on a fast one.
PATIENT = evolve(PROFILES["quick"], seconds=60)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def double(x: Tensor) -> Tensor:
    return x + x


DOUBLE = Op(
    inputs=lambda case: (torch.ones(case.rows, case.size),),
    exact=lambda x: (2 * x.double(),),
    plain=lambda x: (2 * x,),
)


class TestThree(OpsTests):
    ops = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "double": double}  # noqa: RUF012
    extra = {"double": DOUBLE}  # noqa: RUF012


def changes_residual(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y.add_(x)
    return rms_norm(y, weight, eps), y


def norm_of_the_unrounded(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """A norm in half precision throughout."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def mean_over_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    scale = (x.float().square().mean() + eps).rsqrt()
    return (x.float() * scale).to(x.dtype) * weight


BROKEN: dict[str, tuple[str, Callable[..., Any], str]] = {
    "up-first": ("silu_mul", lambda x: silu_mul(x.roll(x.shape[1] // 2, 1)), "got "),
    "eps-forgotten": ("rms_norm", lambda x, w, eps: rms_norm(x, w, 0.0), "got "),
    "wide-result": ("silu_mul", lambda x: silu_mul(x).float(), "torch.float32"),
    "mean-over-rows": ("rms_norm", mean_over_rows, "row 0"),
    "residual-changed": ("add_rms_norm", changes_residual, "argument 1 was changed"),
    "half-precision": ("rms_norm", norm_of_the_unrounded, "float16"),
    "one-output": ("add_rms_norm", lambda x, y, w, eps: rms_norm(x + y, w, eps), "1 outputs"),
    "noise-of-one-seed": (
        "gumbel_noise",
        lambda seed, child, position, size: torch.zeros(len(seed), size),
        "got 0",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_operation_is_caught(name: str) -> None:
    op, function, says = BROKEN[name]

    report = check_ops({op: function}, profile=PATIENT)

    [failure] = [check.detail for check in report.checks if check.outcome == "failed"]
    print(failure)
    assert says in failure


def test_operation_without_a_formula_is_told() -> None:
    report = check_ops({"double": double}, profile=PATIENT)

    assert str(report.checks[0]).endswith(
        "skipped: the kit has no formula for it; `extra` takes one"
    )


def test_case_is_told_in_words() -> None:
    case = OpCase(rows=2, size=8, dtype="bfloat16", strided=True, flag=True)

    assert str(case) == "2 rows of 8; bfloat16; rows apart; with bias or norm; seed 0"
