"""The Triton sampler against the reference sampler, token by token."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import VOCAB, draw_logits, make_batch
from torch import Tensor

pytest.importorskip("triton")
from triton import knobs

from quire.interfaces.sampling import RowStatus, SampledTokens, SamplingBatch
from quire.testing import SamplerTests
from quire.testing.kit_report import Profile
from quire_kernels import ops, sampling
from quire_sampling import triton as descriptor
from quire_sampling.reference.sampler import ReferenceSampler
from quire_sampling.triton.sampler import TritonSampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")


class TestTriton(SamplerTests):
    """A few cases on a CPU: in the interpreter, a launch takes milliseconds a program."""

    sampler = TritonSampler
    device = DEVICE
    profile = Profile(name="few", seconds=4, examples=6, longest=0, shrink_s=0, least=2)
    vocab_sizes = (12, 1, 70)
    num_draws = 50


def sample(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    done = TritonSampler().sample(logits.to(DEVICE, copy=True), batch)
    assert done.token_ids.shape == (len(logits), 1)
    assert done.token_ids.dtype is torch.int64
    assert done.status.dtype is torch.int32
    return done


def check(logits: Tensor, rows: list[dict[str, Any]]) -> None:
    """Fail unless both samplers draw the same tokens, or tokens whose scores are equal by rounding.

    A logarithm may differ in its last bit between PyTorch and Triton; cases are chosen so that
    the filters leave the same tokens whatever the rounding.
    """
    logits = logits.to(DEVICE)
    batch = make_batch(rows, vocab_size=logits.shape[1], device=DEVICE)
    want = ReferenceSampler().sample(logits.clone(), batch)

    done = sample(logits, batch)

    assert done.status.tolist() == want.status.tolist()
    apart = (done.token_ids != want.token_ids).flatten()
    assert not (apart & (batch.temperature == 0)).any()
    for i in apart.nonzero().flatten().tolist():
        assert may_be_confused(
            logits[i].float(), batch, i, want.token_ids[i, 0], done.token_ids[i, 0]
        )


def may_be_confused(logits: Tensor, batch: SamplingBatch, i: int, *tokens: Tensor) -> bool:
    """Answer whether rounding decides between two tokens of a row that nothing filters."""
    counter = (batch.seed[i : i + 1], batch.child_index[i : i + 1], batch.position[i : i + 1])
    scores = logits / batch.temperature[i]
    one, other = (int(token) // 64 for token in tokens)
    if one == other:
        noise = ops.gumbel_noise(*counter, len(logits))[0]
        first, second = (float(scores[token] + noise[token]) for token in tokens)
    else:
        noise = ops.gumbel_noise(*counter, max(one, other) + 1, stage=1)[0]
        masses = [scores[64 * group : 64 * group + 64].logsumexp(0) for group in (one, other)]
        first, second = float(masses[0] + noise[one]), float(masses[1] + noise[other])
    return abs(first - second) <= 1e-6 * (1 + abs(first))


# No top_p that sums of equal probabilities reach exactly: there rounding decides.
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 4},
    "top_k of one": {"top_k": 1},
    "top_p": {"top_p": 0.71},
    "tiny top_p": {"top_p": 1e-6},
    "top_p near one": {"top_p": 0.9993},
    "min_p": {"min_p": 0.15},
    "min_p of one": {"min_p": 1.0},
    "top_k and top_p": {"top_k": 40, "top_p": 0.52},
    "all": {"temperature": 1.5, "top_k": 30, "top_p": 0.87, "min_p": 0.1},
}


@pytest.mark.parametrize("row", FILTERS.values(), ids=FILTERS.keys())
def test_each_filter_draws_the_tokens_of_the_reference(row: dict[str, Any]) -> None:
    check(draw_logits(2, 7, vocab_size=2100), [{**row, "seed": i} for i in range(2)])


ROWS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([1, 2, 5, 50, 1 << 30]),
        "top_p": st.sampled_from([0.13, 0.52, 0.87, 0.991, 1.0, 1.0]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1, 1.0]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "child": st.integers(0, 127),
        "position": st.integers(0, 2**31 - 1),
    }
)


@given(
    st.lists(ROWS, min_size=1, max_size=3),
    st.sampled_from([1, 2, 5, 100, 1003]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["plain", "ties", "holes", "wide"]),
    st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_any_mix_of_rows_draws_the_tokens_of_the_reference(
    rows: list[dict[str, Any]], vocab_size: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    logits = draw_logits(len(rows), seed, vocab_size=vocab_size)
    if kind == "ties":
        logits = logits.round()
    elif kind == "holes":
        logits[logits < -0.5] = -INF
    elif kind == "wide":
        logits = logits * 40
    rows = [{**row, "top_k": min(row["top_k"], vocab_size)} for row in rows]

    check(logits.to(dtype), rows)


BAD_ROWS = {
    "one NaN": {3: NAN},
    "a NaN beside infinity": {3: NAN, 4: INF},
    "infinity": {5: INF},
    "all minus infinity": dict.fromkeys(range(VOCAB), -INF),
    "all NaN": dict.fromkeys(range(VOCAB), NAN),
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS.keys())
@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_row_that_is_not_finite_gets_a_status_and_the_others_their_tokens(
    bad: dict[int, float], temperature: float
) -> None:
    logits = draw_logits(3)
    rows = [
        {"temperature": temperature, "top_k": 5, "top_p": 0.87, "min_p": 0.05, "seed": i}
        for i in range(3)
    ]
    batch = make_batch(rows, device=DEVICE)
    clean = sample(logits, batch)
    for token_id, value in bad.items():
        logits[1, token_id] = value

    done = sample(logits, batch)

    assert done.status.tolist() == [RowStatus.OK, RowStatus.NOT_FINITE, RowStatus.OK]
    assert done.token_ids[[0, 2]].tolist() == clean.token_ids[[0, 2]].tolist()
    assert 0 <= done.token_ids[1].item() < VOCAB


def test_greedy_ties_take_the_lowest_id_across_blocks() -> None:
    logits = torch.zeros(2, 2500)
    logits[1, [1100, 2400, 700]] = 1.0

    done = sample(logits, make_batch([{"temperature": 0}] * 2, vocab_size=2500, device=DEVICE))

    assert done.token_ids.flatten().tolist() == [0, 700]


@pytest.mark.parametrize("row", [{"top_k": 3}, {"top_p": 2.5 / 9000}], ids=["top_k", "top_p"])
def test_filters_among_more_equals_than_there_is_room_for_keep_the_first(
    row: dict[str, Any],
) -> None:
    rows = [{**row, "position": i} for i in range(2)]

    check(torch.zeros(2, 9000), rows)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        pytest.param(0.25, 1, marks=pytest.mark.slow),
        pytest.param(0.5, 2, marks=pytest.mark.slow),
        (0.5000001, 3),
        (1.0, 4),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    logits = torch.full((6, VOCAB), -INF)
    logits[:, :4] = 0.0  # a quarter each, exactly
    rows = [{"top_p": top_p, "position": i} for i in range(6)]

    check(logits, rows)

    tokens = sample(logits, make_batch(rows, device=DEVICE)).token_ids.flatten()
    assert max(tokens.tolist()) < kept


def test_suppressed_tokens_are_never_taken() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, 4], logits[:, 7] = 50.0, 20.0
    batch = make_batch([{"temperature": i % 2, "position": i} for i in range(4)], device=DEVICE)
    rows = torch.tensor([0, 1], device=DEVICE)
    batch.suppressed = (rows, torch.full_like(rows, 4))

    assert sample(logits, batch).token_ids.flatten().tolist() == [7, 7, 4, 4]


def test_row_whose_every_token_is_suppressed_fails_alone() -> None:
    batch = make_batch([{}, {}], device=DEVICE)
    batch.suppressed = tuple(
        column.to(DEVICE) for column in (torch.zeros(VOCAB, dtype=torch.int64), torch.arange(VOCAB))
    )

    assert sample(draw_logits(2), batch).status.tolist() == [RowStatus.NOT_FINITE, RowStatus.OK]


@pytest.mark.parametrize("temperature", [1e-5, 1e4])
def test_extreme_temperatures_draw_the_tokens_of_the_reference(temperature: float) -> None:
    rows = [{"temperature": temperature, "position": i, "top_p": 0.953} for i in range(4)]

    check(draw_logits(4) * 100, rows)


def test_logits_whose_rows_lie_apart_are_read_where_they_are() -> None:
    logits = draw_logits(3, vocab_size=2 * VOCAB).to(DEVICE)
    batch = make_batch([{"seed": i, "top_k": 5} for i in range(3)], device=DEVICE)
    want = sample(logits[:, :VOCAB].contiguous(), batch).token_ids

    assert TritonSampler().sample(logits[:, :VOCAB], batch).token_ids.tolist() == want.tolist()


@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-5, 1e-3])
def test_draws_of_near_equals_are_the_references(distance: float) -> None:
    # Logits that undo the noise of tokens: within a group all have about the same score.
    seeds = torch.arange(8, device=DEVICE)
    noise = ops.gumbel_noise(seeds, seeds, seeds, 5000)
    apart = torch.rand(8, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE) * distance

    tokens, status = sampling.sample(apart - noise, torch.ones(8, device=DEVICE), *[seeds] * 3)

    scores = apart - noise + noise
    assert status.tolist() == [0] * 8
    for row, token in zip(scores, tokens.tolist(), strict=True):
        group = row[token // 64 * 64 :][:64]
        # The logarithms of two devices may differ in their last digit.
        assert group.max() - row[token] <= 4e-6


def test_token_of_many_groups_does_not_depend_on_the_other_rows() -> None:
    logits = draw_logits(9, vocab_size=5000)
    rows = [{"seed": i, "temperature": 0.7} for i in range(9)]
    together = sample(logits, make_batch(rows, vocab_size=5000, device=DEVICE)).token_ids

    for i, row in enumerate(rows):
        one = make_batch([row], vocab_size=5000, device=DEVICE)
        assert sample(logits[i : i + 1], one).token_ids.tolist() == together[i : i + 1].tolist()


def test_draws_follow_the_distribution() -> None:
    num_draws = 150
    logits = torch.tensor([0.0, 1.0, 2.0])
    batch = make_batch([{"position": i} for i in range(num_draws)], vocab_size=3, device=DEVICE)

    tokens = sample(logits.repeat(num_draws, 1), batch).token_ids.flatten().cpu()

    expected = logits.softmax(-1) * num_draws
    difference = torch.bincount(tokens, minlength=3) - expected
    # Chi-square with two degrees of freedom exceeds 32 once in ten million.
    assert (difference.square() / expected).sum().item() < 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_call_serves_any_mix_of_rows() -> None:
    vocab_size = 5000
    logits = draw_logits(3, vocab_size=vocab_size).to(DEVICE)
    plain = make_batch([{"seed": i} for i in range(3)], vocab_size=vocab_size, device=DEVICE)
    plain.any_top_k = True
    sampler = TritonSampler()
    sampler.sample(logits, plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        done = sampler.sample(logits, plain)
    rows = [{"temperature": 0.0}, {"top_k": 9, "top_p": 0.83}, {"min_p": 0.2, "temperature": 0.7}]
    mixed = make_batch(rows, vocab_size=vocab_size, device=DEVICE)
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        getattr(plain, name).copy_(getattr(mixed, name))
    graph.replay()

    assert done.token_ids.tolist() == sampler.sample(logits, mixed).token_ids.tolist()


def test_sampler_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TritonSampler.why_unsupported("cuda") is None

    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert TritonSampler.why_unsupported("cpu") is None
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert "no compiler for 'cpu'" in str(TritonSampler.why_unsupported("cpu"))


def test_plugin_says_when_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    [plugin] = descriptor.quire_samplers()
    assert plugin.why_unusable() is None

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plugin.why_unusable() == "Triton is not installed; `pip install triton` adds it"
