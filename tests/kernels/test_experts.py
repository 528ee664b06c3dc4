"""Products with experts: what a token chooses, the plan of tiles, and the Triton kernel."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, check, draw, poison
from torch import Tensor
from torch.nn import functional

from quire_kernels import ops

pytest.importorskip("triton")
from quire_kernels import experts as kernels
from quire_kernels import few_experts, mixtures, routing

Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# Tokens, experts, experts a token, sizes: with and without a plan, and an expert with all tokens.
SHAPES = {
    "one token": (1, 8, 2, 48, 24),
    "as many as have no plan": (few_experts.MAX_TOKENS, 7, 3, 40, 17),
    "one token more": (few_experts.MAX_TOKENS + 1, 6, 1, 40, 16),
    "rows of several blocks": (2, 5, 2, 1500, 140),
    "more experts than pairs": (20, 64, 2, 72, 33),
    "all experts": (17, 3, 3, 16, 72),
    "one expert": (90, 1, 1, 24, 16),
    "tiles of 64 rows": (150, 2, 1, 130, 20),
}


def given(name: str, dtype: torch.dtype, seed: int = 0) -> Given:
    """Return tokens, weights and the choice."""
    num_tokens, num_experts, top_k, hidden, size = SHAPES[name]
    scores = draw(num_tokens, num_experts, seed=seed)
    weights, ids = ops.route(scores, top_k, normalise=True)
    return (
        draw(num_tokens, hidden, dtype=dtype, seed=seed + 1),
        draw(num_experts, 2 * size, hidden, dtype=dtype, seed=seed + 2) / hidden**0.5,
        draw(num_experts, hidden, size, dtype=dtype, seed=seed + 3) / size**0.5,
        weights,
        ids,
    )


def by_hand(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Return the sums in the tensors' own dtype, token by token."""
    rows = []
    for row, shares, chosen in zip(x, weights, ids.tolist(), strict=True):
        made = []
        for share, expert in zip(shares, chosen, strict=True):
            gate, up = (gate_up[expert] @ row).chunk(2)
            made.append(share * (down[expert] @ (functional.silu(gate) * up)))
        rows.append(torch.stack(made).sum(0).to(x.dtype))
    return torch.stack(rows)


@pytest.mark.parametrize("function", [kernels.experts, ops.experts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_sums_are_those_of_every_token_by_itself(
    name: str, dtype: torch.dtype, function: object
) -> None:
    tensors = given(name, dtype)
    exact = by_hand(*(t.double() for t in tensors[:4]), tensors[4])
    poison(*tensors[0].shape, dtype=dtype)

    out = function(*tensors)

    check(out, exact, by_hand(*tensors))


def test_rows_may_lie_apart() -> None:
    x, *rest = given("one token more", torch.float32)
    wide = torch.full((len(x), 2 * x.shape[1]), float("nan"), device=DEVICE)
    wide[:, : x.shape[1]] = x

    out = kernels.experts(wide[:, : x.shape[1]], *rest)

    assert torch.equal(out, kernels.experts(x, *rest))


@pytest.mark.parametrize("name", SHAPES)
def test_a_nan_stays_in_its_token(name: str) -> None:
    x, *rest = given(name, torch.float32)
    x[len(x) // 2] = float("nan")

    out = kernels.experts(x, *rest)

    assert out.isnan().any(1).nonzero().flatten().tolist() == [len(x) // 2]


def test_no_token_gives_nothing() -> None:
    x, gate_up, down, weights, ids = given("all experts", torch.float32)

    for function in (kernels.experts, ops.experts):
        assert function(x[:0], gate_up, down, weights[:0], ids[:0]).shape == (0, x.shape[1])


@pytest.mark.parametrize(("rows", "many"), [(16, False), (64, False), (32, True)])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(("num_pairs", "num_experts"), [(1, 4), (33, 60), (200, 3), (256, 128)])
def test_every_pair_has_one_place_in_a_tile_of_its_expert(
    num_pairs: int,
    num_experts: int,
    many: bool,
    skewed: bool,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if many:
        monkeypatch.setattr(routing, "MANY_PAIRS", 0)
        monkeypatch.setattr(routing, "CHUNK", 64)
        monkeypatch.setattr(routing, "_FEW_PAIRS", 16)
    generator = torch.Generator().manual_seed(num_pairs)
    ids = torch.randint(0, num_experts, (num_pairs,), generator=generator)
    ids = (
        torch.where(torch.rand(num_pairs, generator=generator) < 0.9, ids[0], ids)
        if skewed
        else ids
    )

    pairs, owners = routing.plan(ids.to(DEVICE), num_experts, rows)

    tiles = pairs.cpu().view(-1, rows)
    assert len(tiles) == len(owners)
    placed = tiles[tiles < num_pairs]
    assert sorted(placed.tolist()) == list(range(num_pairs))
    for tile, owner in zip(tiles, owners.tolist(), strict=True):
        own = tile[tile < num_pairs]
        assert (ids[own] == owner).all()
        # Pairs come first and in order, so that a sum does not depend on how threads race.
        assert own.tolist() == sorted(own.tolist())
        assert (tile[len(own) :] == num_pairs).all()


def test_a_plan_is_made_of_shapes_alone() -> None:
    ids = torch.zeros(50, dtype=torch.int64, device="meta")

    pairs, owners = routing.plan(ids, 8, 16)

    assert (pairs.shape, owners.shape) == ((11 * 16,), (11,))


def test_ids_are_of_the_likeliest_and_weights_sum_to_one_where_asked() -> None:
    logits = draw(9, 7, seed=4)
    chances = logits.double().softmax(-1)

    for normalise in (False, True):
        weights, ids = ops.route(logits, 3, normalise=normalise)

        exact, best = chances.topk(3)
        assert torch.equal(ids, best)
        exact = exact / exact.sum(-1, keepdim=True) if normalise else exact
        assert torch.allclose(weights.double(), exact, rtol=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 3), (60, 4), (300, 8), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_chooses_as_pytorch_does(
    dtype: torch.dtype, num_experts: int, top_k: int, normalise: bool
) -> None:
    wide = draw(9, 2 * num_experts, seed=4)
    logits = wide.argsort(-1)[:, :num_experts].to(dtype) / num_experts
    assert routing.serves(logits, top_k)

    weights, ids = routing.route(logits, top_k, normalise=normalise)

    exact, best = mixtures.route(logits.double().cpu(), top_k, normalise=normalise)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
    # Numbers that bfloat16 does not tell apart may come in either order.
    assert dtype == torch.bfloat16 or torch.equal(ids.cpu(), best)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert torch.allclose(weights.double().cpu(), exact, rtol=1e-6)


def test_equal_experts_are_chosen_by_number_and_a_nan_chooses_some() -> None:
    logits = torch.zeros(3, 6, device=DEVICE)
    logits[1, 4] = float("nan")
    logits[2, 5] = float("inf")

    weights, ids = routing.route(logits, 2, normalise=True)

    assert ids[0].tolist() == [0, 1]
    assert weights[0].tolist() == [0.5, 0.5]
    for row in (1, 2):
        assert weights[row].isnan().any()
        assert len(set(ids[row].tolist())) == 2


def test_table_has_cuts_of_tiles() -> None:
    """What was measured is read, and has the shape that the kernels want."""
    from quire_kernels import experts_plans as plans

    for card in plans._table().values():
        for shape, rows in card.items():
            assert len(shape.split("x")) == 4
            for bucket in rows:
                assert int(bucket) in plans.BUCKETS
    mixtral = "8x2x4096x14336"
    found = plans._measured("NVIDIA H200", mixtral, 64)
    assert found is not None
    assert found == plans._measured("NVIDIA H100 80GB HBM3", mixtral, 64)
    assert plans._measured("another card", mixtral, 64) is None
    assert plans.bucket_of(1, 128) == 1
    assert plans.bucket_of(2048, 128) == 16
    assert plans.bucket_of(10**7, 8) == 1024
