"""Perplexity, accuracy, agreement and divergence against Transformers and float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from transformers import LlamaForCausalLM

from quire.benchmark.passages import chat_ids, cut
from quire.benchmark.quality import Tally, logits_of, measure, watched
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.frontend import Frontend
from quire.llm import LLM

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.json. no such file")

PASSAGES = [[5, 17, 99, 3, 3, 42, 8, 61, 20, 11, 7], [1, 2, 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_folder(tmp_path_factory.mktemp("tiny"))


def opened(folder: Path, **options: Any) -> Frontend:
    given = {**tiny_llama.OPTIONS, "model": str(folder), **options}
    return Frontend(EngineConfig.from_options(given))


def transformers_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0, :-1]
    return logits


@pytest.mark.parametrize("max_num_batched_tokens", [4, 64])
def test_logits_are_those_of_transformers_however_steps_are_cut(
    folder: Path, max_num_batched_tokens: int
) -> None:
    frontend = opened(folder, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=2)

    logits = logits_of(LLM.from_frontend(frontend), PASSAGES[0])

    expected = transformers_logits(folder, PASSAGES[0])
    assert logits.shape == (10, 101)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_figures_are_those_of_a_plain_computation(folder: Path, tmp_path: Path) -> None:
    other = tiny_llama.write_folder(tmp_path, seed=1)

    report = measure(opened(other), PASSAGES, opened(folder), window=100)

    own = torch.cat([transformers_logits(other, p) for p in PASSAGES]).log_softmax(-1)
    true = torch.cat([transformers_logits(folder, p) for p in PASSAGES]).log_softmax(-1)
    targets = torch.tensor([token for p in PASSAGES for token in p[1:]])
    for row, logprobs in zip(report["rows"], (true, own), strict=True):
        loss = torch.nn.functional.nll_loss(logprobs, targets).item()
        assert row["tokens"] == 12
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-3)
        assert row["accuracy"] == (logprobs.argmax(-1) == targets).double().mean().item()
    kl = torch.nn.functional.kl_div(own, true, log_target=True, reduction="batchmean").item()
    assert report["rows"][0]["kl_divergence"] is None
    assert report["rows"][1]["kl_divergence"] == pytest.approx(kl, rel=1e-3)
    agreed = (own.argmax(-1) == true.argmax(-1)).double().mean().item()
    assert report["rows"][1]["agreement"] == agreed


def test_model_is_at_no_distance_from_itself(folder: Path) -> None:
    report = measure(opened(folder), PASSAGES, opened(folder), window=100)

    assert report["rows"][1]["agreement"] == 1
    assert report["rows"][1]["kl_divergence"] == 0


def test_token_that_the_baseline_excludes_adds_nothing() -> None:
    tally = Tally()
    baseline = torch.tensor([[0.0, 0.0, -torch.inf]])

    tally.add(torch.zeros(1, 3), torch.tensor([0]), baseline)

    assert tally.divergence == pytest.approx(torch.tensor(1.5).log().item())


def test_baseline_with_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tiny_llama.write_folder(tmp_path, vocab_size=55)

    with pytest.raises(ConfigError, match="baseline has 55 tokens and the model 101"):
        measure(opened(folder), PASSAGES, opened(other), window=100)


def test_watching_ends_with_its_block(folder: Path) -> None:
    model = LLM.from_frontend(opened(folder)).engine.runner.model
    hidden = torch.zeros(2, 32)

    with watched(model) as seen:
        model.logits(hidden)
    model.logits(hidden)

    assert [rows.shape for rows in seen] == [(2, 101)]


def test_cut_keeps_every_token_but_a_lonely_one() -> None:
    assert cut([[1, 2, 3, 4, 5], [6], [7, 8]], 2) == [[1, 2], [3, 4], [7, 8]]


def test_cut_refuses_a_file_without_two_tokens() -> None:
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        cut([[1], []], 10)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: an object with a list 'messages'"),
        ('{"messages": [{"role": 3}]}', "line 2: .*role"),
    ],
)
def test_bad_line_of_dialogues_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    good = {"messages": [{"role": "user", "content": "hi"}]}
    path.write_text(f"{json.dumps(good)}\n{line}\n")
    frontend = Frontend(EngineConfig.from_options({"model": "demo"}))

    try:
        with pytest.raises(ConfigError, match=words):
            chat_ids(frontend, path)
    finally:
        frontend.close()
