"""Allowed and forbidden tokens and bad words, judged by Transformers, alone, mixed and drawn."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_batch import NaiveSequence, added
from torch import Tensor
from transformers.generation.logits_process import (
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from quire.execution.adjustments import LogitAdjustments
from quire.execution.batch_builder import BuiltBatch
from quire.execution.sampling_rows import SamplingRows
from quire.request import SamplingParams
from quire.scheduling.output import AddedSequence
from quire_sampling.reference.sampler import ReferenceSampler

VOCAB, ROWS = 11, 5
CPU = torch.device("cpu")
Words = tuple[tuple[int, ...], ...]


def sequence(
    row: int, params: SamplingParams, tokens: list[int], num_prompt: int, **more: Any
) -> AddedSequence:
    naive = NaiveSequence(
        sequence_id=row, token_ids=tokens, num_prompt_tokens=num_prompt, row=row, tables=[[1]]
    )
    return added(naive, params=params, **more)


def expected(logits: Tensor, params: SamplingParams, words: Words, generated: list[int]) -> Tensor:
    """Return one row's logits after Transformers' processors; words look at the answer alone."""
    scores = logits.float()[None].clone()
    history = torch.tensor([generated], dtype=torch.int64)
    if params.allowed_token_ids is not None:
        allowed = list(params.allowed_token_ids)
        scores = PrefixConstrainedLogitsProcessor(lambda _row, _ids: allowed, 1)(history, scores)
    if params.forbidden_token_ids:
        scores = SuppressTokensLogitsProcessor(list(params.forbidden_token_ids))(history, scores)
    if words:
        scores = NoBadWordsLogitsProcessor([list(word) for word in words])(history, scores)
    return scores[0]


TOKEN = st.integers(0, VOCAB - 1)
BANS = st.fixed_dictionaries(
    {},
    optional={
        "allowed_token_ids": st.lists(TOKEN, min_size=1, max_size=6),
        "forbidden_token_ids": st.lists(TOKEN, max_size=3),
    },
)
# Few tokens, so that words come up; long ones reach back beyond what was generated.
WORD = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)


def params_of(bans: dict[str, Any]) -> SamplingParams:
    allowed, forbidden = bans.get("allowed_token_ids"), bans.get("forbidden_token_ids", [])
    if allowed is not None and not set(allowed) - set(forbidden):
        bans = {**bans, "forbidden_token_ids": []}
    return SamplingParams(**bans)


@given(
    st.lists(st.tuples(BANS, st.lists(WORD, max_size=4)), min_size=1, max_size=6),
    st.integers(0, 2**32),
)
@settings(max_examples=120, deadline=None)
def test_rows_that_come_grow_and_change_hands_have_transformers_logits(
    kinds: list[tuple[dict[str, Any], list[tuple[int, ...]]]], seed: int
) -> None:
    rng = random.Random(seed)
    adjustments = LogitAdjustments(ROWS, VOCAB, CPU)
    lives: dict[int, tuple[SamplingParams, Words, list[int]]] = {}
    for _ in range(10):
        for row in rng.sample(range(ROWS), rng.randint(0, 2) if lives else ROWS):
            bans, words = rng.choice(kinds)
            # One that was preempted comes back with what it had.
            generated = [rng.randrange(4) for _ in range(rng.choice([0, 0, 3, 9]))]
            lives[row] = (params_of(bans), tuple(dict.fromkeys(words)), generated)
            tokens = [rng.randrange(4) for _ in range(3)] + generated
            adjustments.add(
                sequence(row, lives[row][0], tokens, 3, bad_words_token_ids=lives[row][1])
            )
        rows = rng.sample(list(lives), rng.randint(1, len(lives)))
        logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed))
        want = [expected(one, *lives[row]) for one, row in zip(logits, rows, strict=True)]

        found = adjustments.apply(logits.clone(), rows)

        torch.testing.assert_close(found, torch.stack(want), rtol=0, atol=0)
        sampled = [rng.randrange(4) for _ in rows]
        adjustments.count(torch.tensor(sampled), rows)
        for row, token_id in zip(rows, sampled, strict=True):
            lives[row][2].append(token_id)


def test_longest_word_is_found_where_its_row_just_holds_it() -> None:
    adjustments = LogitAdjustments(ROWS, VOCAB, CPU)
    word = tuple(i % 7 for i in range(64))
    tokens = [9, 9, *word[:62]]
    adjustments.add(sequence(1, SamplingParams(), tokens, 2, bad_words_token_ids=(word,)))
    before = adjustments.apply(torch.zeros(1, VOCAB), [1])
    adjustments.count(torch.tensor([word[62]]), [1])

    after = adjustments.apply(torch.zeros(1, VOCAB), [1])

    assert before.isfinite().all()
    assert after.isinf().nonzero().tolist() == [[0, word[63]]]


def test_words_look_for_nothing_in_the_prompt() -> None:
    adjustments = LogitAdjustments(ROWS, VOCAB, CPU)
    adjustments.add(sequence(0, SamplingParams(), [3, 4], 2, bad_words_token_ids=((4, 5),)))

    assert adjustments.apply(torch.zeros(1, VOCAB), [0]).isfinite().all()


def test_rows_without_bans_keep_nothing_on_the_device() -> None:
    adjustments = LogitAdjustments(ROWS, VOCAB, CPU)
    adjustments.add(sequence(0, SamplingParams(temperature=0), [1, 2], 2))
    logits = torch.randn(1, VOCAB)

    assert not adjustments.asks([0])
    assert adjustments.apply(logits, [0]) is logits
    assert adjustments._bans._mask is None
    assert adjustments._bans._recent is None


MIX = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 1.5]), "seed": st.integers(0, 99)},
    optional={
        "top_k": st.integers(1, VOCAB),
        "top_p": st.sampled_from([0.3, 0.9]),
        "min_p": st.sampled_from([0.05, 0.5]),
        "repetition_penalty": st.sampled_from([0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-1.0, 0.5]),
        "presence_penalty": st.sampled_from([1.0]),
        "logit_bias": st.dictionaries(TOKEN, st.sampled_from([-100, 5.0]), max_size=2),
        "min_tokens": st.integers(0, 3),
        "allowed_token_ids": st.lists(TOKEN, min_size=4, max_size=8, unique=True),
        "forbidden_token_ids": st.lists(TOKEN, max_size=2),
    },
)
STORY = st.tuples(MIX, st.lists(WORD, max_size=1), st.lists(TOKEN, min_size=1, max_size=4))


class Rows:
    """The sampling half of a step, for rows whose logits are given."""

    def __init__(self, stories: list[Any], places: list[int]) -> None:
        self.adjustments = LogitAdjustments(ROWS, VOCAB, CPU)
        self.sampling = SamplingRows(ROWS, VOCAB, CPU)
        self.rows = places
        self.lengths = []
        for row, (mix, words, prompt) in zip(places, stories, strict=True):
            one = sequence(
                row,
                params_of(mix),
                prompt,
                len(prompt),
                bad_words_token_ids=tuple(words),
                seed=mix["seed"],
                stop_token_ids=frozenset({10}),
            )
            self.adjustments.add(one)
            self.sampling.add(one)
            self.lengths.append(len(prompt))

    def step(self, logits: Tensor) -> list[tuple[int, int]]:
        """Return token and status of each row."""
        built = BuiltBatch(
            batch=None,  # type: ignore[arg-type]
            sampled_ids=self.rows,
            sampled_rows=self.rows,
            sampled_positions=torch.tensor(self.lengths, dtype=torch.int32).numpy(),
        )
        batch = self.sampling.batch(built)
        done = ReferenceSampler().sample(self.adjustments.apply(logits, self.rows), batch)
        self.adjustments.count(done.token_ids[:, 0], self.rows)
        self.lengths = [length + 1 for length in self.lengths]
        return list(zip(done.token_ids[:, 0].tolist(), done.status.tolist(), strict=True))


@given(st.lists(STORY, min_size=1, max_size=ROWS), st.integers(0, 2**32), st.randoms())
@settings(max_examples=80, deadline=None)
def test_each_row_of_a_mix_of_all_parameters_equals_the_row_alone(
    stories: list[Any], seed: int, rng: random.Random
) -> None:
    places = rng.sample(range(ROWS), len(stories))
    together, alone = Rows(stories, places), [Rows([story], [0]) for story in stories]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(6):
        logits = torch.randn(len(stories), VOCAB, generator=generator) * 2

        found = together.step(logits.clone())

        assert found == [
            one.step(row[None].clone())[0] for one, row in zip(alone, logits, strict=True)
        ]


DRAWN: dict[str, tuple[dict[str, Any], Words, list[int]]] = {
    "allowed": ({"allowed_token_ids": [0, 2, 3, 5, 8]}, (), []),
    "forbidden": ({"forbidden_token_ids": [1, 9]}, (), []),
    "bad words": ({}, ((4,), (7, 6), (6, 6)), [7]),
    "all": ({"allowed_token_ids": list(range(8)), "forbidden_token_ids": [0]}, ((7, 6),), [7]),
    "logit_bias": ({"logit_bias": {2: 1.5, 5: -2.0, 7: -100}}, (), []),
    "repetition_penalty": ({"repetition_penalty": 1.7}, (), [4, 4, 6]),
    "frequency_penalty": ({"frequency_penalty": 0.8}, (), [4, 4, 4, 6]),
    "presence_penalty": ({"presence_penalty": -1.2}, (), [4, 4, 4, 6]),
    "every penalty": (
        {
            "logit_bias": {4: 2.0},
            "repetition_penalty": 0.6,
            "frequency_penalty": -0.5,
            "presence_penalty": 1.0,
            "forbidden_token_ids": [3],
        },
        ((8,),),
        [4, 6, 6],
    ),
}


def adjusted(logits: Tensor, params: SamplingParams, before: list[int], said: list[int]) -> Tensor:
    """Return the logits after bias and penalties, a token at a time."""
    found = logits.tolist()
    for token_id, bias in (params.logit_bias or {}).items():
        found[token_id] += bias
    for token_id in {*before, *said}:
        penalty, logit = params.repetition_penalty, found[token_id]
        found[token_id] = logit * penalty if logit < 0 else logit / penalty
    for token_id in set(said):
        found[token_id] -= said.count(token_id) * params.frequency_penalty
        found[token_id] -= params.presence_penalty
    return torch.tensor(found)


@pytest.mark.parametrize(("bans", "words", "generated"), DRAWN.values(), ids=DRAWN.keys())
def test_draws_follow_the_distribution_of_what_is_left(
    bans: dict[str, Any], words: Words, generated: list[int]
) -> None:
    num_draws = 100_000
    params = SamplingParams(seed=5, **bans)
    adjustments = LogitAdjustments(1, VOCAB, CPU)
    sampling = SamplingRows(1, VOCAB, CPU)
    one = sequence(0, params, [1, *generated], 1, bad_words_token_ids=words, seed=5)
    adjustments.add(one)
    sampling.add(one)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    plain = adjusted(logits[0], params, [1], generated)
    want = expected(plain, params, words, generated).double().softmax(0)
    left = adjustments.apply(logits, [0])
    rows = torch.zeros(num_draws, dtype=torch.int64)
    batch = sampling.gather(rows, torch.arange(num_draws), **sampling.flags([0]))

    tokens = ReferenceSampler().sample(left.expand(num_draws, -1), batch).token_ids.flatten()

    counts = torch.bincount(tokens, minlength=VOCAB).double()
    possible = want > 1e-30  # a bias of -100 leaves next to nothing
    assert counts[~possible].sum() == 0
    difference = counts[possible] - num_draws * want[possible]
    freedom = int(possible.sum()) - 1
    # What a chi-square exceeds once in about ten million; by Wilson and Hilferty.
    ratio = 2 / (9 * freedom)
    limit = freedom * (1 - ratio + 5.2 * math.sqrt(ratio)) ** 3
    assert (difference**2 / (num_draws * want[possible])).sum() < limit
