"""Requests of each trace through a real server: right usage, the offline engine's tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Server, events_of, serving

from quire import LLM, SamplingParams
from quire.benchmark.workload import Ask, TokenRange, read_trace, trace_asks

TRACES = Path(__file__).parents[1] / "data/traces"
CONTEXT = 2048
SCALES = {"azure_conv_2023.csv": 0.1, "mooncake_conversation.jsonl": 1 / 96}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def offline() -> LLM:
    return LLM("demo", dtype="float32", num_threads=1)


async def replay(url: str, asks: list[Ask]) -> list[tuple[list[int], dict[str, Any]]]:
    """Return the token ids and the usage of each; every other one is streamed."""
    limit = asyncio.Semaphore(64)
    bounds = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=bounds) as client:

        async def one(number: int, ask: Ask) -> tuple[list[int], dict[str, Any]]:
            body = {
                "model": "demo",
                "prompt": list(ask.prompt),
                "max_tokens": ask.max_tokens,
                "temperature": 0,
                "return_token_ids": True,
                "stream": number % 2 == 0,
            }
            if body["stream"]:
                body["stream_options"] = {"include_usage": True}
            async with limit:
                answer = await client.post(url + "/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return read(answer) if body["stream"] else whole(answer.json())

        return await asyncio.gather(*[one(*pair) for pair in enumerate(asks)])


def whole(answer: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    return answer["choices"][0]["token_ids"], answer["usage"]


def read(answer: httpx.Response) -> tuple[list[int], dict[str, Any]]:
    *chunks, last, done = events_of(answer.text)
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]  # type: ignore[index]
    assert sum(choice["finish_reason"] is not None for choice in choices) == 1
    token_ids = [i for choice in choices for i in choice.get("token_ids", ())]
    return token_ids, last["usage"]  # type: ignore[index]


@pytest.mark.parametrize("count", [150, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(SCALES))
def test_trace_gives_the_tokens_and_counts_of_the_offline_engine(
    server: Server, offline: LLM, name: str, count: int
) -> None:
    asks = trace_asks(
        read_trace(TRACES / name, count),
        length_scale=SCALES[name],
        speed=1.0,
        max_len=CONTEXT,
        tokens=TokenRange(),
        seed=1,
    )
    params = [SamplingParams(temperature=0, max_tokens=ask.max_tokens) for ask in asks]
    prompts: list[Any] = [{"prompt_token_ids": list(ask.prompt)} for ask in asks]
    expected = offline.generate(prompts, params, use_tqdm=False)

    found = asyncio.run(replay(server.url, asks))

    assert len(found) == count
    for ask, output, (token_ids, usage) in zip(asks, expected, found, strict=True):
        wanted = output.outputs[0].token_ids
        assert token_ids == wanted
        assert usage["prompt_tokens"] == len(ask.prompt)
        assert usage["completion_tokens"] == len(wanted)
        assert usage["total_tokens"] == len(ask.prompt) + len(wanted)
    server.wait_until_idle()
