"""Bias, penalties and log-probabilities through the whole engine, judged by Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llama import has_all_blocks, make_engine, prompt, request, run_all
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from quire.request import Request, SequenceUpdate, TokenLogprobs

LENGTHS = (1, 3, 8, 9, 21, 40)
SMALL = 22 * 4 * 2 * 2 * 2 * 8 * 4  # bytes of 22 blocks of 4 tokens: too few for all requests
WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "tiny chunks": {"max_num_batched_tokens": 3},
    "few rows": {"max_num_seqs": 2, "max_num_batched_tokens": 11},
    "preempted": {"kv_cache_memory_bytes": SMALL, "max_model_len": 60},
    "without prefix cache": {"enable_prefix_caching": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


@torch.no_grad()
def oracle_logits(oracle: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    return oracle(torch.tensor([token_ids])).logits[0].float()


def adjusted(logits: torch.Tensor, before: list[int], generated: list[int], params: Any) -> Any:
    """Return one row's logits after bias and penalties, worked out token by token."""
    logits = logits.clone()
    for token_id, value in (params.logit_bias or {}).items():
        logits[token_id] += value
    penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    logits = penalty(torch.tensor([before + generated]), logits[None])[0]
    for token_id in set(generated):
        times = generated.count(token_id)
        logits[token_id] -= times * params.frequency_penalty + params.presence_penalty
    return logits


def check_greedy(oracle: LlamaForCausalLM, one: Request, tokens: list[int]) -> None:
    """Check that each token is the best of the oracle's adjusted logits, to the last bits."""
    before = list(one.prompt_token_ids)
    rows = oracle_logits(oracle, before + tokens)[len(before) - 1 : -1]
    for i, (row, token_id) in enumerate(zip(rows, tokens, strict=True)):
        logits = adjusted(row, before, tokens[:i], one.params)
        assert logits[token_id] >= logits.max() - 1e-3, (one.request_id, i)


MIXED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8, "n": 2},
    {},
    {"frequency_penalty": 2.0, "presence_penalty": -1.5},
    {"logit_bias": {3: 8.0, 50: -100}, "presence_penalty": 2.0},
    {"repetition_penalty": 0.7, "frequency_penalty": -0.5, "n": 3},
    {"logit_bias": dict.fromkeys(range(90), -100)},
]


def mixed_requests(first: int = 0) -> list[Request]:
    return [
        request(first + i, prompt(i, length), **params)
        for i, (length, params) in enumerate(zip(LENGTHS, MIXED, strict=True))
    ]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_bias_and_penalties_give_the_oracles_tokens_in_every_way_of_computing_them(
    folder: Path, oracle: LlamaForCausalLM, options: dict[str, Any], depth: int
) -> None:
    engine = make_engine(folder, **options)
    engine._depth = depth
    # The second half takes the rows of the first.
    requests = [*mixed_requests(), *mixed_requests(10)]

    tokens, _ = run_all(engine, requests)

    assert {key[0] for key in tokens} == {one.request_id for one in requests}
    for one in requests:
        for index in range(one.params.n):
            check_greedy(oracle, one, tokens[one.request_id, index])
    assert ("kv_cache_memory_bytes" in options) == (engine.scheduler.num_preemptions > 0)
    assert has_all_blocks(engine)


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 3.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 1.0]),
        "frequency_penalty": st.sampled_from([-1.0, 0.0, 0.5, 2.0]),
        "logit_bias": st.dictionaries(
            st.integers(0, 100), st.sampled_from([-100, 5.0]), max_size=3
        ),
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 16),
    },
)


@given(
    st.lists(st.tuples(st.integers(1, 30), PARAMS), min_size=1, max_size=7),
    st.integers(1, 2),
    st.sampled_from([2, 7, 64]),
    st.integers(1, 4),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_counts_are_right_whatever_shares_rows_forks_or_is_preempted(
    folder: Path,
    oracle: LlamaForCausalLM,
    stories: list[tuple[int, dict[str, Any]]],
    depth: int,
    num_tokens: int,
    num_rows: int,
) -> None:
    engine = make_engine(
        folder,
        max_num_seqs=min(num_rows, num_tokens),
        max_num_batched_tokens=num_tokens,
        kv_cache_memory_bytes=SMALL,
        max_model_len=60,
    )
    engine._depth = depth
    requests = [request(i, prompt(i, n), **params) for i, (n, params) in enumerate(stories)]

    tokens, _ = run_all(engine, requests)

    for (request_id, _), found in tokens.items():
        check_greedy(oracle, requests[int(request_id[1:])], found)


def close(a: float, b: float) -> bool:
    return abs(a - b) < 1e-3


def check_entry(found: TokenLogprobs, row: torch.Tensor, token_id: int, num_top: int) -> None:
    want = row.log_softmax(-1)
    assert close(found.logprob, want[token_id].item())
    assert abs(found.rank - 1 - int((want > want[token_id]).sum())) <= 1  # an almost equal one
    best = want.topk(num_top)
    assert len(found.top_ids) == len(found.top_logprobs) == num_top
    assert all(map(close, found.top_logprobs, best.values.tolist()))
    assert all(map(close, found.top_logprobs, want[list(found.top_ids)].tolist()))


def prompt_logprobs_of(updates: list[SequenceUpdate], request_id: str) -> Any:
    """Return what was delivered, after checking that it came once and with the first token."""
    own = [u for u in updates if u.request_id == request_id and u.index == 0]
    assert [u.prompt_logprobs is not None for u in own] == [True] + [False] * (len(own) - 1)
    return own[0].prompt_logprobs


def scored_requests(first: int = 0, **params: Any) -> list[Request]:
    asked = [{"prompt_logprobs": i % 3, "logprobs": 4 - i % 5, "n": 1 + i % 2} for i in range(6)]
    return [
        request(first + i, prompt(i, length), **{**asked[i], **params})
        for i, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_logprobs_of_prompt_and_answer_are_the_oracles(
    folder: Path, oracle: LlamaForCausalLM, options: dict[str, Any], depth: int
) -> None:
    engine = make_engine(folder, **options)
    engine._depth = depth
    plain = [request(50 + i, prompt(i, length)) for i, length in enumerate(LENGTHS)]
    run_all(engine, plain)  # the prefix cache is warm
    requests = [*scored_requests(), *[request(60, prompt(9, 5))]]

    tokens, updates = run_all(engine, requests)

    for one in requests[:-1]:
        ids, params = list(one.prompt_token_ids), one.params
        rows = oracle_logits(oracle, ids)
        first, *others = prompt_logprobs_of(updates, one.request_id)
        assert first is None
        assert len(others) == len(ids) - 1
        for row, token_id, found in zip(rows, ids[1:], others, strict=False):
            check_entry(found, row, token_id, params.prompt_logprobs or 0)
        for index in range(params.n):
            generated = tokens[one.request_id, index]
            entries = [
                entry
                for u in updates
                if (u.request_id, u.index) == (one.request_id, index)
                for entry in u.logprobs or ()
            ]
            rows = oracle_logits(oracle, ids + generated)[len(ids) - 1 : -1]
            for row, token_id, found in zip(rows, generated, entries, strict=True):
                check_entry(found, row, token_id, params.logprobs or 0)
    silent = [u for u in updates if u.request_id == "r60"]
    assert all(u.logprobs is None and u.prompt_logprobs is None for u in silent)
    assert has_all_blocks(engine)


def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt(
    folder: Path, oracle: LlamaForCausalLM
) -> None:
    engine = make_engine(folder, max_num_batched_tokens=4)
    ids = prompt(5, 40)
    engine.add_request(request(0, ids, prompt_logprobs=1))
    updates: list[SequenceUpdate] = []
    for _ in range(5):
        updates += engine.step()

    (sequence,) = engine.scheduler._requests["r0"]
    engine.scheduler._preempt(sequence)
    while engine.has_unfinished():
        updates += engine.step()

    first, *others = prompt_logprobs_of(updates, "r0")
    assert (first, len(others)) == (None, 39)
    rows = oracle_logits(oracle, ids)[:-1]
    for row, token_id, found in zip(rows, ids[1:], others, strict=True):
        check_entry(found, row, token_id, 1)


def test_logprobs_are_those_of_the_raw_logits(folder: Path, oracle: LlamaForCausalLM) -> None:
    engine = make_engine(folder)
    change = {"logit_bias": {7: 100.0}, "repetition_penalty": 2.0, "temperature": 0.5}

    tokens, updates = run_all(engine, [request(0, prompt(2, 6), logprobs=2, seed=4, **change)])

    generated = tokens["r0", 0]
    rows = oracle_logits(oracle, prompt(2, 6) + generated)[5:-1]
    assert set(generated) == {7}
    for row, update in zip(rows, updates, strict=True):
        check_entry(update.logprobs[0], row, 7, 2)


def test_asking_for_logprobs_changes_no_token(folder: Path) -> None:
    plain, _ = run_all(make_engine(folder), scored_requests(logprobs=None, prompt_logprobs=None))
    asked, _ = run_all(make_engine(folder), scored_requests(logprobs=20, prompt_logprobs=20))

    assert plain == asked


def test_rows_that_ask_for_nothing_keep_no_counts(folder: Path) -> None:
    engine = make_engine(folder)

    run_all(engine, [request(0, prompt(0, 9), min_tokens=2)])

    adjustments = engine.runner._adjustments
    assert adjustments._counts is None
    assert adjustments._plan is None


def test_end_and_stop_tokens_wait_for_min_tokens_whatever_the_bias(folder: Path) -> None:
    engine = make_engine(folder)
    one = request(0, prompt(0, 5), min_tokens=4, logit_bias={9: 100, 10: 50})
    one = evolve(one, eos_token_ids=frozenset({9}), stop_token_ids=frozenset({9, 10}))

    tokens, _ = run_all(engine, [one])

    assert tokens["r0", 0][4:] == [9]
    assert not {9, 10} & set(tokens["r0", 0][:4])
