"""Bias and penalties over a row's life equal those worked out from the list of its tokens."""

from __future__ import annotations

import random

import pytest
import torch
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_batch import NaiveSequence, added
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from quire.execution.adjustments import LogitAdjustments
from quire.request import SamplingParams

VOCAB, ROWS = 13, 4
PARAMS = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.4, presence_penalty=1.0),
    SamplingParams(frequency_penalty=-1.5),
    SamplingParams(logit_bias={0: -100, 12: 3.5}),
    SamplingParams(logit_bias={5: 9}, frequency_penalty=0.3, repetition_penalty=3.0),
]


@define
class Life:
    """One sequence in a row."""

    row: int
    params: SamplingParams
    prompt: list[int]
    generated: list[int]


def put(adjustments: LogitAdjustments, life: Life) -> None:
    tokens = life.prompt + life.generated
    naive = NaiveSequence(
        sequence_id=life.row, token_ids=tokens, num_prompt_tokens=len(life.prompt), row=life.row
    )
    adjustments.add(added(naive, params=life.params))


def expected(logits: torch.Tensor, life: Life) -> torch.Tensor:
    params, logits = life.params, logits.float().clone()
    for token_id, value in (params.logit_bias or {}).items():
        logits[token_id] += value
    penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    logits = penalty(torch.tensor([life.prompt + life.generated]), logits[None])[0]
    counts = torch.bincount(torch.tensor(life.generated, dtype=torch.int64), minlength=VOCAB)
    logits -= counts * params.frequency_penalty
    return logits - (counts > 0) * params.presence_penalty


def new_life(rng: random.Random, row: int) -> Life:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
    # One that was preempted comes back with what it had.
    generated = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 5]))]
    return Life(row, rng.choice(PARAMS), prompt, generated)


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_rows_that_come_grow_and_change_hands_are_adjusted_by_their_own_tokens(
    seed: int, dtype: torch.dtype
) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    adjustments = LogitAdjustments(ROWS, VOCAB, torch.device("cpu"))
    lives: dict[int, Life] = {}
    for _ in range(12):
        for row in rng.sample(range(ROWS), rng.randint(0, 2) if lives else ROWS):
            lives[row] = new_life(rng, row)
            put(adjustments, lives[row])
        step = rng.sample(list(lives.values()), rng.randint(1, len(lives)))
        rows = [life.row for life in step]
        logits = (torch.randn(len(step), VOCAB, generator=generator) * 4).to(dtype)
        want = torch.stack([expected(row, life) for row, life in zip(logits, step, strict=True)])

        found = adjustments.apply(logits, rows)

        torch.testing.assert_close(found.float(), want)
        sampled = [rng.randrange(VOCAB) for _ in step]
        adjustments.count(torch.tensor(sampled), rows)
        for life, token_id in zip(step, sampled, strict=True):
            life.generated.append(token_id)


@pytest.mark.parametrize("others", [[], [SamplingParams(repetition_penalty=2.0)]])
def test_step_without_a_row_that_asks_gets_its_own_logits_back(
    others: list[SamplingParams],
) -> None:
    adjustments = LogitAdjustments(ROWS, VOCAB, torch.device("cpu"))
    put(adjustments, Life(0, SamplingParams(top_k=3, min_tokens=2), [1], []))
    for row, params in enumerate(others, start=1):
        put(adjustments, Life(row, params, [1], []))
    logits = torch.randn(1, VOCAB).bfloat16()

    assert adjustments.apply(logits, [0]) is logits
