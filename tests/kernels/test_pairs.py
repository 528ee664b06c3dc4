"""Products of pairs of a token and an expert: by the Triton kernels, and by the op on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import check, draw, poison
from torch import Tensor

from quire_kernels import ops

pytest.importorskip("triton")
from quire_kernels import pairs


def by_hand(x: Tensor, weight: Tensor, ids: Tensor, top_k: int, bias: Tensor | None) -> Tensor:
    """Return the products pair by pair; `weight` [num_experts, outputs, inputs]."""
    rows = [weight[e] @ x[p // top_k] for p, e in enumerate(ids.flatten().tolist())]
    made = torch.stack(rows)
    return made if bias is None else made + bias[ids.flatten()]


def kernels(x: Tensor, weight: Tensor, ids: Tensor, **options: Any) -> Tensor:
    given = options["top_k"], options["bias"], options["is_transposed"]
    return pairs.products(x, weight, ids.flatten(), *given)


@pytest.mark.parametrize("function", [kernels, ops.expert_products])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 3), (21, 2)])
def test_each_pair_has_the_product_of_its_expert(
    num_tokens: int,
    top_k: int,
    has_bias: bool,
    is_transposed: bool,
    dtype: torch.dtype,
    function: Any,
) -> None:
    num_experts, size, outputs = 5, 36, 44
    x = draw(num_tokens, size, dtype=dtype)
    weight = draw(num_experts, outputs, size, dtype=dtype, seed=1) / size**0.5
    bias = draw(num_experts, outputs, dtype=dtype, seed=2) if has_bias else None
    _, ids = ops.route(draw(num_tokens, num_experts, seed=3), top_k, normalise=True)
    stored = weight.transpose(1, 2).contiguous() if is_transposed else weight
    poison(num_tokens * top_k, outputs, dtype=dtype)

    out = function(x, stored, ids, top_k=top_k, bias=bias, is_transposed=is_transposed)

    wide = None if bias is None else bias.double()
    exact = by_hand(x.double(), weight.double(), ids, top_k, wide)
    check(out, exact, by_hand(x, weight, ids, top_k, bias))


@pytest.mark.parametrize("function", [kernels, ops.expert_products])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_no_pair_gives_nothing(is_transposed: bool, function: Any) -> None:
    weight = draw(3, 16, 16)
    ids = torch.zeros(0, 2, dtype=torch.int64, device=weight.device)

    out = function(draw(0, 16), weight, ids, top_k=2, bias=None, is_transposed=is_transposed)

    assert out.shape == (0, 16)
