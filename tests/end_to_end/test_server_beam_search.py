"""Beam search over HTTP: what vLLM's clients send, what is refused, and that nothing is left."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import Server, serving

from quire import LLM, BeamSearchParams

CHAT = [{"role": "user", "content": "A large latte, please."}]
PROMPT = "I want"
SEARCH: dict[str, Any] = {"model": "demo", "max_tokens": 10, "use_beam_search": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-num-seqs", "8") as running:
        yield running


def ask(server: Server, path: str, **body: Any) -> httpx.Response:
    given = {"prompt": PROMPT} if path == "completions" else {"messages": CHAT}
    return httpx.post(f"{server.url}/v1/{path}", json={**SEARCH, **given, **body}, timeout=60)


def test_completion_equals_offline(server: Server) -> None:
    asked = {"length_penalty": 0.5, "early_stopping": True}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        wide = pool.submit(ask, server, "completions", n=4, **asked)
        best = pool.submit(ask, server, "completions", n=2, best_of=4, temperature=1, **asked)
        plain = pool.submit(ask, server, "completions", use_beam_search=False, temperature=0)

    llm = LLM("demo", num_threads=1)
    params = BeamSearchParams(beam_width=4, max_tokens=10, **asked)
    [found] = llm.beam_search([PROMPT], params)
    texts = [sequence.text for sequence in found.sequences]
    assert [PROMPT + c["text"] for c in wide.result().json()["choices"]] == texts
    assert [PROMPT + c["text"] for c in best.result().json()["choices"]] == texts[:2]
    assert plain.result().status_code == 200
    assert server.figure("quire:kv_blocks_used") == 0


def test_chat_gives_as_many_choices_with_log_probabilities(server: Server) -> None:
    answer = ask(server, "chat/completions", n=3, logprobs=True, top_logprobs=2)

    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    sums = [sum(e["logprob"] for e in c["logprobs"]["content"]) for c in choices]
    lengths = [len(c["logprobs"]["content"]) for c in choices]
    assert all(len(e["top_logprobs"]) == 2 for e in choices[0]["logprobs"]["content"])
    scores = [total / length for total, length in zip(sums, lengths, strict=True)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("stream", True), ("seed", 5), ("stop", ["x"]), ("presence_penalty", 1.0)),
        *(("repetition_penalty", 1.1), ("temperature", 0.5), ("top_p", 0.5), ("top_k", 5)),
        *(("logit_bias", {"5": 1}), ("prompt_logprobs", 0)),
    ],
)
def test_what_a_search_does_not_do_is_a_400(
    server: Server, path: str, field: str, value: Any
) -> None:
    answer = ask(server, path, n=2, **{field: value})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert "beam" in answer.json()["error"]["message"]


def test_width_that_no_step_has_room_for_is_a_400(server: Server) -> None:
    answer = ask(server, "completions", n=2, best_of=9)

    assert answer.status_code == 400
    assert "--max-num-seqs" in answer.json()["error"]["message"]


def test_client_that_leaves_ends_its_search(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/completions",
            json={**SEARCH, "prompt": PROMPT, "n": 8, "max_tokens": 400, "ignore_eos": True},
            timeout=0.3,
        )

    assert ask(server, "completions", n=8).status_code == 200
    assert server.figure("quire:kv_blocks_used") == 0
    assert server.figure("vllm:num_requests_running") == 0
