"""The kit passes a right sampler, catches every broken one, and says what is wrong."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from broken_samplers import BROKEN, SAYS
from plain_sampler import PlainSampler

from quire.errors import ConfigError
from quire.testing import SamplerTests, check_sampler
from quire.testing.kit_report import PROFILES
from quire.testing.sampler_cases import Row
from quire.testing.sampler_formula import MISTAKES, Mistake, allowed, draw, philox

# As many cases on a slow machine as on a fast one.
PATIENT = evolve(PROFILES["quick"], seconds=60, shrink_s=0.2)


class WithLogprobs(PlainSampler):
    gives_logprobs = True


class TestPlain(SamplerTests):
    sampler = WithLogprobs


# All of them with `--all`.
SOME = [
    pytest.param(name, marks=pytest.mark.slow) if number % 4 else name
    for number, name in enumerate(BROKEN)
]


@pytest.mark.parametrize("name", SOME)
def test_broken_sampler_is_caught(name: str) -> None:
    report = check_sampler(BROKEN[name], profile=PATIENT, vocab_sizes=[12, 5, 1, 100])

    failed = [check.detail for check in report.checks if check.outcome == "failed"]
    print(*failed)
    assert len(failed) == 1
    assert SAYS[name] in failed[0]


# Source: kat_vectors of Random123 (Salmon et al.), philox 4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_answers(
    counter: int, key: int, answer: tuple[int, ...]
) -> None:
    words = [torch.tensor([counter])] * 4

    assert tuple(lane.item() for lane in philox(tuple(words), key)) == answer


LOGITS = torch.tensor([2.0, 0.5, 2.0, -1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("row", "tokens"),
    [
        (Row(), {0, 1, 2, 3, 4, 5}),
        (Row(top_k=1), {0}),
        (Row(top_k=3), {0, 2, 4}),
        (Row(top_p=0.4), {0, 2}),
        (Row(top_p=1e-6), {0}),
        (Row(min_p=1.0), {0, 2}),
        (Row(min_p=0.3), {0, 2, 4}),
        (Row(temperature=100.0, min_p=0.983), {0, 1, 2, 4}),
        (Row(top_k=3, top_p=0.99, min_p=0.5), {0, 2}),
    ],
    ids=str,
)
def test_filters_leave_what_the_contract_says(row: Row, tokens: set[int]) -> None:
    found = allowed(LOGITS, row)

    assert found.is_clear
    assert set(found.surely.nonzero().flatten().tolist()) == tokens


def test_token_at_the_edge_of_a_filter_is_left_open() -> None:
    quarters = torch.zeros(4)

    found = allowed(quarters, Row(top_p=0.5))

    assert found.surely.tolist() == [True, True, False, False]
    assert found.perhaps.tolist() == [True, True, True, False]


def test_draw_is_open_to_the_token_of_the_largest_score_alone() -> None:
    found = draw(LOGITS, Row(seed=5), num_draws=40)

    tokens = torch.arange(6)[:, None].expand(-1, 40)
    assert bool(found.may_be(found.best).all())
    assert sum(int(found.may_be(token).sum()) for token in tokens) == 40


ROWS = [
    Row(temperature=0.5, seed=2**40, child=3, position=7),
    Row(temperature=3.0, top_k=4, top_p=0.8, min_p=0.05),
    Row(temperature=3.0, top_k=4, top_p=0.8, seed=1),
    Row(temperature=2.0, min_p=0.3, seed=2),
    Row(temperature=2.0, top_k=3, seed=3, position=2**16),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.words)
def test_known_mistake_is_not_taken_for_right(mistake: Mistake) -> None:
    logits = torch.cat((LOGITS, torch.linspace(-1.0, 0.0, 94)))
    wrong = [draw(logits, row, mistake, num_draws=200).best for row in ROWS]
    right = [draw(logits, row, num_draws=200) for row in ROWS]

    assert not all(bool(d.may_be(tokens).all()) for d, tokens in zip(right, wrong, strict=True))


class Elsewhere(PlainSampler):
    @classmethod
    def why_unsupported(cls, device: str) -> str | None:
        return "it needs a moon"


def test_sampler_that_does_not_run_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="does not run on cpu: it needs a moon"):
        check_sampler(Elsewhere)
