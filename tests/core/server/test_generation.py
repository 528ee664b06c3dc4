"""The streams of one HTTP request, with a real engine process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from quire.config import EngineConfig
from quire.errors import OverloadedError, RequestError
from quire.frontend import Frontend
from quire.request import SamplingParams
from quire.server.admission import ServingLimits
from quire.server.async_engine import AsyncEngine
from quire.server.generation import Asked, Generation

OPTIONS: dict[str, Any] = {
    "model": "demo",
    "num_threads": 1,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 32 << 20,
}
LIMITS = ServingLimits(max_queued_requests=12, max_queued_tokens=100)
LONG = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
Run = Callable[[Callable[[AsyncEngine], Coroutine[Any, Any, None]]], None]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    frontend = Frontend(EngineConfig.from_options(OPTIONS))
    with asyncio.Runner() as runner:
        engine = AsyncEngine.from_frontend(frontend, LIMITS)
        runner.run(engine.start())
        yield lambda test: runner.run(test(engine))
        runner.run(engine.stop())


@pytest.mark.parametrize("prompts", [["A"] * 17, [[5] * 60, [5] * 60]], ids=["requests", "tokens"])
def test_prompts_that_never_fit_the_queue_are_refused_for_good(run: Run, prompts: Any) -> None:
    async def test(engine: AsyncEngine) -> None:
        with pytest.raises(RequestError, match="more than the queue holds"):
            await Generation.begin(engine, Asked(prompts=prompts, params=LONG))
        assert engine.admission.num_requests == engine.admission.num_tokens == 0

    run(test)


def test_prompts_that_do_not_fit_now_may_be_sent_again(run: Run) -> None:
    async def test(engine: AsyncEngine) -> None:
        running = await Generation.begin(engine, Asked(prompts=["A"] * 8, params=LONG))
        with pytest.raises(OverloadedError, match="queue is full"):
            await Generation.begin(engine, Asked(prompts=["A"] * 16, params=LONG))
        assert engine.admission.num_requests == 8
        running.close()

    run(test)


def test_one_bad_prompt_ends_the_others(run: Run) -> None:
    async def test(engine: AsyncEngine) -> None:
        with pytest.raises(RequestError, match="allowed: token ids"):
            await Generation.begin(engine, Asked(prompts=[[5], [5], [10**6]], params=LONG))
        assert not engine.streams
        assert engine.admission.num_requests == engine.admission.num_tokens == 0

    run(test)


def test_others_have_their_turn_while_many_prompts_are_tokenized(run: Run) -> None:
    async def test(engine: AsyncEngine) -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count())
        generation = await Generation.begin(engine, Asked(prompts=["A"] * 16, params=LONG))
        counting.cancel()
        generation.close()
        assert turns >= 10

    run(test)


@pytest.mark.parametrize("n", [1, 4])
def test_time_per_token_is_that_of_one_choice(run: Run, n: int) -> None:
    params = SamplingParams(n=n, max_tokens=20, ignore_eos=True)

    async def test(engine: AsyncEngine) -> None:
        generation = await Generation.begin(engine, Asked(prompts=["A"], params=params))
        await generation.finish()
        stream = generation.streams[0]
        assert stream.first_token_s is not None
        took_s = stream.last_token_s - stream.first_token_s
        assert generation.seconds_per_token() == pytest.approx(took_s / 19)
        generation.close()

    run(test)


def test_token_that_is_not_wanted_is_not_counted(run: Run) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)

    async def test(engine: AsyncEngine) -> None:
        asked = Asked(prompts=["A"], params=params, generates=False)
        generation = await Generation.begin(engine, asked)
        await generation.finish()
        assert generation.usage.completion_tokens == 0
        assert generation.seconds_per_token() is None
        generation.close()

    run(test)
