"""Products with experts in e4m3: the Triton kernels and the plain body against float64."""

from __future__ import annotations

import attrs
import pytest
import torch
from kernel_cases import check, draw, poison
from torch import Tensor
from torch.nn import functional

from quire_kernels import few_experts, mixtures, ops
from quire_kernels.mixtures import ExpertScales

pytest.importorskip("triton")
from quire_kernels import experts as kernels

# Tokens, experts, experts a token, sizes.
SHAPES = {
    "a few": (few_experts.MAX_TOKENS, 7, 3, 80, 40),
    "tiles": (20, 5, 2, 144, 72),
}
BLOCKS = {"a scale an output": (1, 0), "blocks": (16, 32), "a scale for all": (1000, 0)}


def blocks_of(outputs: int, inputs: int, block: tuple[int, int]) -> tuple[int, int]:
    return -(-outputs // block[0]), -(-inputs // block[1]) if block[1] else 1


def given(
    name: str, block: tuple[int, int], dtype: torch.dtype
) -> tuple[list[Tensor], ExpertScales]:
    """Return tokens, weights, the choice, and scales."""
    num_tokens, num_experts, top_k, hidden, size = SHAPES[name]
    weights, ids = mixtures.route(draw(num_tokens, num_experts), top_k, normalise=True)
    gate_up = draw(num_experts, 2 * size, hidden, seed=2).clamp(-3, 3).to(torch.float8_e4m3fn)
    down = draw(num_experts, hidden, size, seed=3).clamp(-3, 3).to(torch.float8_e4m3fn)
    tall, wide = blocks_of(size, hidden, block)
    first = draw(num_experts, 2 * tall, wide, seed=4).abs() / hidden**0.5 + 0.01
    second = draw(num_experts, *blocks_of(hidden, size, block), seed=5).abs() / size**0.5 + 0.01
    x = draw(num_tokens, hidden, dtype=dtype, seed=1)
    return [x, gate_up, down, weights, ids], ExpertScales(first, second, block)


def by_hand(given: list[Tensor], scales: ExpertScales, dtype: torch.dtype) -> Tensor:
    """Return the sums in a dtype, token by token."""
    x, gate_up, down, weights, ids = given
    rows = []
    for row, shares, chosen in zip(x.to(dtype), weights, ids.tolist(), strict=True):
        total = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
        for share, expert in zip(shares, chosen, strict=True):
            wide = mixtures.scaled_up(gate_up[expert], scales.gate_up[expert], scales.block, 2)
            gate, up = (wide.to(dtype) @ row).chunk(2)
            back = mixtures.scaled_up(down[expert], scales.down[expert], scales.block).to(dtype)
            total += share.to(dtype) * (back @ (functional.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", SHAPES)
def test_sums_are_those_of_every_token_by_itself(name: str, block: str, dtype: torch.dtype) -> None:
    tensors, scales = given(name, BLOCKS[block], dtype)
    exact = by_hand(tensors, scales, torch.float64)
    plain = by_hand(tensors, scales, dtype)
    poison(*tensors[0].shape, dtype=dtype)

    for function in (kernels.experts, ops.experts):
        out = function(*tensors, scales=scales)
        if dtype == torch.float32:
            torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
        else:
            check(out, exact, plain)


@pytest.mark.parametrize("block", BLOCKS)
def test_rounded_rows_have_scales_of_their_own(block: str) -> None:
    tensors, scales = given("tiles", BLOCKS[block], torch.bfloat16)
    tensors[0][1] *= 10
    exact = by_hand(tensors, scales, torch.float64)

    out = kernels.experts(*tensors, scales=attrs.evolve(scales, rounds_inputs=True))

    # e4m3 has 4 digits: errors of 3% of a number, which sums of a hundred make less.
    error = (out.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.mean() < 0.06
    assert error.min() > 0.001


def test_nan_of_a_weight_is_one_in_what_its_expert_makes() -> None:
    tensors, scales = given("tiles", (16, 32), torch.bfloat16)
    tensors[1].view(torch.uint8)[2, 5, 7] = 0x7F
    has_it = (tensors[4] == 2).any(1)

    for function in (kernels.experts, ops.experts):
        assert torch.equal(function(*tensors, scales=scales).isnan().any(1), has_it)
