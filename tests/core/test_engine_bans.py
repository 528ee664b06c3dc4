"""Allowed and forbidden tokens, bad words and best_of through the whole engine and `LLM`."""

from __future__ import annotations

from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import tiny_llama
import torch
from attrs import evolve
from tiny_llama import has_all_blocks, make_engine, prompt, request, run_all
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import NoBadWordsLogitsProcessor

from quire import LLM, SamplingParams
from quire.errors import RequestError
from quire.request import Request

SMALL = 22 * 4 * 2 * 2 * 2 * 8 * 4  # bytes of 22 blocks of 4 tokens: too few for all requests
WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "tiny chunks": {"max_num_batched_tokens": 3},
    "few rows": {"max_num_seqs": 2, "max_num_batched_tokens": 11},
    "preempted": {"kv_cache_memory_bytes": SMALL, "max_model_len": 60},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> LlamaForCausalLM:
    from safetensors.torch import load_file

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


@torch.no_grad()
def check_greedy(oracle: LlamaForCausalLM, one: Request, tokens: list[int]) -> None:
    """Check that each token is the best of those that are left, to the last bits."""
    before, params = list(one.prompt_token_ids), one.params
    rows = oracle(torch.tensor([before + tokens])).logits[0].float()[len(before) - 1 : -1]
    for i, (row, token_id) in enumerate(zip(rows, tokens, strict=True)):
        left = row.clone()
        if params.allowed_token_ids is not None:
            banned = set(range(len(row))) - set(params.allowed_token_ids)
            left[list(banned)] = -torch.inf
        left[list(params.forbidden_token_ids)] = -torch.inf
        if one.bad_words_token_ids:
            words = [list(word) for word in one.bad_words_token_ids]
            history = torch.tensor([tokens[:i]], dtype=torch.int64)
            left = NoBadWordsLogitsProcessor(words)(history, left[None])[0]
        assert left[token_id] >= left.max() - 1e-3, (one.request_id, i)


def plain_tokens(folder: Path) -> list[list[int]]:
    """Return what each prompt's answer is where nothing is banned."""
    tokens, _ = run_all(make_engine(folder), [request(i, prompt(i, 5 + 7 * i)) for i in range(6)])
    return [tokens[f"r{i}", 0] for i in range(6)]


def banning_requests(said: list[list[int]], first: int = 0) -> list[Request]:
    """Return requests whose bans hit what their prompts would be answered."""
    bans: list[dict[str, Any]] = [
        {"forbidden_token_ids": said[0][:2], "n": 2},
        {},
        {"allowed_token_ids": list(range(0, 101, 3))},
        {},
        {"forbidden_token_ids": said[4][3:5], "allowed_token_ids": [*said[4], 7, 8], "n": 3},
        {},
    ]
    words: list[tuple[tuple[int, ...], ...]] = [
        (),
        (),
        (),
        (tuple(said[3][1:4]), tuple(said[3][:1])),
        (tuple(said[4][:2]),),
        (tuple(said[5][2:4]), tuple(said[5][5:10])),
    ]
    return [
        evolve(
            request(first + i, prompt(i, 5 + 7 * i), **params),
            bad_words_token_ids=own,
        )
        for i, (params, own) in enumerate(zip(bans, words, strict=True))
    ]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_bans_give_the_oracles_tokens_in_every_way_of_computing_them(
    folder: Path, oracle: LlamaForCausalLM, options: dict[str, Any], depth: int
) -> None:
    said = plain_tokens(folder)
    engine = make_engine(folder, **options)
    engine._depth = depth
    # The second half takes the rows of the first.
    requests = [*banning_requests(said), *banning_requests(said, 10)]

    tokens, _ = run_all(engine, requests)

    for one in requests:
        for index in range(one.params.n):
            check_greedy(oracle, one, tokens[one.request_id, index])
    assert tokens["r1", 0] == said[1]
    changed = [i for i in (0, 2, 3, 4, 5) if tokens[f"r{i}", 0] != said[i]]
    assert changed == [0, 2, 3, 4, 5]
    assert ("kv_cache_memory_bytes" in options) == (engine.scheduler.num_preemptions > 0)
    assert has_all_blocks(engine)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tiny_llama.write_folder(tmp_path_factory.mktemp("text"), vocab_size=256)
    tiny_llama.write_tokenizer(folder)
    options = {k: v for k, v in tiny_llama.OPTIONS.items() if k != "skip_tokenizer_init"}
    return LLM(str(folder), **options)


def answer(llm: LLM, **params: Any) -> Any:
    given = SamplingParams(**{"max_tokens": 8, "seed": 4, **params})
    (output,) = llm.generate("hello", given, use_tqdm=False)
    return output


@pytest.mark.parametrize(("n", "best_of"), [(1, 4), (2, 6), (3, 3)])
def test_best_of_are_those_of_all_with_the_highest_logprobs(llm: LLM, n: int, best_of: int) -> None:
    every = answer(llm, n=best_of, logprobs=0).outputs

    best = answer(llm, n=n, best_of=best_of).outputs

    if best_of > n:
        every.sort(key=lambda one: -one.cumulative_logprob)
    assert [one.token_ids for one in best] == [one.token_ids for one in every[:n]]
    assert [one.index for one in best] == list(range(n))
    assert all(one.logprobs is None for one in best)


def test_best_of_is_not_streamed(llm: LLM) -> None:
    with pytest.raises(RequestError, match="best_of is 3, above n") as caught:
        next(llm.stream("hello", SamplingParams(best_of=3)))

    assert caught.value.parameter == "best_of"
    assert not llm.engine.has_unfinished()


def test_bad_words_are_not_said(llm: LLM) -> None:
    letters = llm.get_tokenizer().encode(ascii_letters)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "allowed_token_ids": letters}
    said = answer(llm, **options).outputs[0].text
    words = [said[i : i + 2] for i in range(0, 24, 3)]

    text = answer(llm, **options, bad_words=words).outputs[0].text

    assert len(said) == len(text) == 24
    assert not any(word in text for word in words)


def test_prompt_is_cut_to_its_last_tokens(llm: LLM) -> None:
    output = answer(llm, truncate_prompt_tokens=3)

    assert output.prompt == "hello"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("llo")
