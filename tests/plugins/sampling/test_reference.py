"""The reference sampler against plain computations, its distributions, and its isolation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import VOCAB, draw_logits, make_batch
from torch import Tensor

from quire.interfaces.sampling import RowStatus, SampledTokens, SamplingBatch
from quire.testing import SamplerTests
from quire_kernels import ops
from quire_sampling.reference.sampler import ReferenceSampler

NAN, INF = float("nan"), float("inf")


class TestReference(SamplerTests):
    sampler = ReferenceSampler


def sample(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    done = ReferenceSampler().sample(logits.clone(), batch)
    assert done.token_ids.shape == (len(logits), 1)
    assert done.token_ids.dtype is torch.int64
    assert done.status.shape == (len(logits),)
    assert done.status.dtype is torch.int32
    return done


def probabilities(logits: Tensor, row: dict[str, Any]) -> list[float]:
    """Return the distribution of one row, worked out with a sorted list."""
    scaled = [logit / row.get("temperature", 1.0) for logit in logits.tolist()]
    order = sorted(range(len(scaled)), key=lambda t: (-scaled[t], t))
    kept = order[: row.get("top_k", len(order))]
    top = scaled[order[0]]
    weights = {t: math.exp(scaled[t] - top) for t in kept}
    total, before, nucleus = sum(weights.values()), 0.0, []
    for token_id in kept:
        if before >= row.get("top_p", 1.0) * total:
            break
        nucleus.append(token_id)
        before += weights[token_id]
    # Both are compared with the most likely token, so no sum is needed.
    left = [t for t in nucleus if weights[t] >= row.get("min_p", 0.0)]
    total = sum(weights[t] for t in left)
    return [weights[t] / total if t in left else 0.0 for t in range(len(scaled))]


FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.4},
    "high temperature": {"temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_k of one": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.15},
    "min_p of one": {"min_p": 1.0},
    "all": {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.1},
}


def chi_square_limit(freedom: int) -> float:
    """Return what a chi-square exceeds once in about ten million; by Wilson and Hilferty."""
    ratio = 2 / (9 * max(freedom, 1))
    return max(freedom, 1) * (1 - ratio + 5.2 * math.sqrt(ratio)) ** 3


@pytest.mark.parametrize("row", FILTERS.values(), ids=FILTERS.keys())
def test_draws_follow_the_filtered_distribution(row: dict[str, Any]) -> None:
    num_draws = 100_000
    logits = draw_logits(1, seed=3)[0]
    want = probabilities(logits, row)
    batch = make_batch([row])
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "child_index"):
        setattr(batch, name, getattr(batch, name).expand(num_draws))
    batch.position = torch.arange(num_draws)

    tokens = sample(logits.expand(num_draws, -1), batch).token_ids.flatten()

    counts = torch.bincount(tokens, minlength=VOCAB).tolist()
    possible = [t for t in range(VOCAB) if want[t] > 0]
    assert sum(counts[t] for t in possible) == num_draws, "a filtered token was drawn"
    chi_square = sum(
        (counts[t] - num_draws * want[t]) ** 2 / (num_draws * want[t]) for t in possible
    )
    assert chi_square < chi_square_limit(len(possible) - 1)


@pytest.mark.parametrize("changes", ["seed", "child", "position"])
def test_draws_over_seeds_children_and_positions_follow_the_distribution(changes: str) -> None:
    num_draws = 20_000
    logits = draw_logits(1, seed=5)[0]
    want = probabilities(logits, {})

    batch = make_batch([{changes: i} for i in range(num_draws)])
    tokens = sample(logits.expand(num_draws, -1), batch).token_ids.flatten()

    counts = torch.bincount(tokens, minlength=VOCAB).tolist()
    pairs = zip(counts, want, strict=True)
    chi_square = sum((count - num_draws * p) ** 2 / (num_draws * p) for count, p in pairs)
    assert chi_square < chi_square_limit(VOCAB - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_rows_take_the_most_likely_token(dtype: torch.dtype) -> None:
    logits = draw_logits(6).to(dtype)

    done = sample(logits, make_batch([{"temperature": 0}] * 6))

    assert done.token_ids.flatten().tolist() == logits.argmax(-1).tolist()
    assert done.status.tolist() == [RowStatus.OK] * 6


def test_greedy_ties_take_the_lowest_id_alone_and_beside_draws() -> None:
    logits = torch.zeros(2, VOCAB)
    greedy = make_batch([{"temperature": 0}] * 2)
    mixed = make_batch([{"temperature": 0}, {"temperature": 1, "top_p": 0.5, "top_k": 3}])

    assert sample(logits, greedy).token_ids.flatten().tolist() == [0, 0]
    assert sample(logits, mixed).token_ids[0].item() == 0


def test_top_k_among_equals_keeps_exactly_k() -> None:
    num_draws = 400
    batch = make_batch([{"top_k": 3, "position": i} for i in range(num_draws)])

    tokens = sample(torch.zeros(num_draws, VOCAB), batch).token_ids.flatten()

    assert set(tokens.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.5000001, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    num_draws = 400
    logits = torch.full((num_draws, VOCAB), -INF)
    logits[:, :4] = 0.0  # a quarter each, exactly

    batch = make_batch([{"top_p": top_p, "position": i} for i in range(num_draws)])
    tokens = sample(logits, batch).token_ids.flatten()

    assert set(tokens.tolist()) == set(range(kept))


ROWS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([1, 2, 5, VOCAB]),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1, 1.0]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "child": st.integers(0, 127),
        "position": st.integers(0, 2**20),
    }
)


@given(st.lists(ROWS, min_size=1, max_size=6), st.integers(0, 99), st.randoms())
@settings(max_examples=80, deadline=None)
def test_each_row_in_a_mix_equals_the_row_alone_whichever_place_it_has(
    rows: list[dict[str, Any]], seed: int, rng: Any
) -> None:
    logits = draw_logits(len(rows), seed)
    alone = [
        sample(logits[i : i + 1], make_batch([row])).token_ids[0, 0].item()
        for i, row in enumerate(rows)
    ]
    order = list(range(len(rows)))
    rng.shuffle(order)

    together = sample(logits[order], make_batch([rows[i] for i in order]))

    assert together.token_ids.flatten().tolist() == [alone[i] for i in order]


@given(ROWS, st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_draw_is_the_gumbel_maximum_of_what_the_filters_leave(
    row: dict[str, Any], seed: int
) -> None:
    logits = draw_logits(1, seed)
    row = {**row, "temperature": row["temperature"] or 1.0}
    allowed = [t for t, p in enumerate(probabilities(logits[0], row)) if p > 0]

    batch = make_batch([row])
    token_id = sample(logits, batch).token_ids.item()

    noise = ops.gumbel_noise(batch.seed, batch.child_index, batch.position, VOCAB)[0]
    score = logits[0] / row["temperature"] + noise
    assert token_id == max(allowed, key=lambda t: score[t].item())


BAD_ROWS = {
    "one NaN": {3: NAN},
    "a NaN beside infinity": {3: NAN, 4: INF},
    "infinity": {5: INF},
    "all minus infinity": dict.fromkeys(range(VOCAB), -INF),
    "all NaN": dict.fromkeys(range(VOCAB), NAN),
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS.keys())
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_that_is_not_finite_gets_a_status_and_the_others_their_tokens(
    bad: dict[int, float], temperature: float
) -> None:
    logits = draw_logits(3)
    rows = [{"temperature": temperature, "top_p": 0.9, "min_p": 0.05, "seed": i} for i in range(3)]
    clean = sample(logits, make_batch(rows))
    for token_id, value in bad.items():
        logits[1, token_id] = value

    done = sample(logits, make_batch(rows))

    assert done.status.tolist() == [RowStatus.OK, RowStatus.NOT_FINITE, RowStatus.OK]
    assert done.token_ids[[0, 2]].tolist() == clean.token_ids[[0, 2]].tolist()
    assert 0 <= done.token_ids[1].item() < VOCAB


def test_tokens_of_minus_infinity_are_never_drawn() -> None:
    num_draws = 2000
    logits = torch.full((num_draws, VOCAB), -INF)
    logits[:, [2, 9]] = torch.tensor([0.0, 1.0])

    done = sample(logits, make_batch([{"position": i, "top_p": 0.99} for i in range(num_draws)]))

    assert set(done.token_ids.flatten().tolist()) == {2, 9}
    assert done.status.eq(RowStatus.OK).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_suppressed_tokens_are_never_taken(temperature: float) -> None:
    num_rows = 500
    logits = torch.zeros(num_rows, VOCAB)
    logits[:, 4] = 50.0
    logits[:, 7] = 20.0
    batch = make_batch([{"temperature": temperature, "position": i} for i in range(num_rows)])
    rows = torch.arange(0, num_rows, 2)
    batch.suppressed = (rows, torch.full_like(rows, 4))

    tokens = sample(logits, batch).token_ids.flatten()

    assert (tokens[rows] == 7).all()
    assert (tokens[rows + 1] == 4).all()


def test_row_whose_every_token_is_suppressed_fails_alone() -> None:
    batch = make_batch([{}, {}])
    batch.suppressed = (torch.zeros(VOCAB, dtype=torch.int64), torch.arange(VOCAB))

    done = sample(draw_logits(2), batch)

    assert done.status.tolist() == [RowStatus.NOT_FINITE, RowStatus.OK]


def test_filtered_token_is_not_drawn_by_the_rarest_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(counter: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
        shape = torch.broadcast_shapes(*(word.shape for word in counter), seed.shape)
        return [torch.full(shape, 2**32 - 1)] * 4

    monkeypatch.setattr(ops, "philox_4x32", largest)
    logits = torch.zeros(1, VOCAB)
    logits[0, 6] = 1.0

    assert sample(logits, make_batch([{"top_k": 1}])).token_ids.item() == 6


@pytest.mark.parametrize("temperature", [1e-5, 1e4])
def test_extreme_temperatures_give_tokens_in_range(temperature: float) -> None:
    logits = draw_logits(50) * 100
    rows = [{"temperature": temperature, "position": i, "top_p": 0.95} for i in range(50)]

    done = sample(logits, make_batch(rows))

    assert done.status.eq(RowStatus.OK).all()
    if temperature < 1:
        assert done.token_ids.flatten().tolist() == logits.argmax(-1).tolist()
    else:
        assert len(set(done.token_ids.flatten().tolist())) > 5


def test_draws_from_bfloat16_logits_equal_those_of_their_float32_copies() -> None:
    logits = draw_logits(40).bfloat16()
    rows = [{"position": i, "top_p": 0.8, "temperature": 0.7} for i in range(40)]

    half, full = sample(logits, make_batch(rows)), sample(logits.float(), make_batch(rows))

    assert half.token_ids.tolist() == full.token_ids.tolist()


def test_sampler_runs_everywhere() -> None:
    assert ReferenceSampler.why_unsupported("cpu") is None
    assert ReferenceSampler.why_unsupported("cuda") is None
