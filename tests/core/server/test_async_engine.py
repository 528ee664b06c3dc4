"""The public door, with a real engine process."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, AsyncEngine, SamplingParams
from quire.errors import ConfigError, EngineDeadError, OverloadedError, RequestError
from quire.server.engine_client import EngineStartError
from quire.server.messages import StepStats

OPTIONS: dict[str, Any] = {"num_threads": 1, "max_num_seqs": 4, "kv_cache_memory_bytes": 32 << 20}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
Test = Callable[[AsyncEngine], Coroutine[Any, Any, None]]


def with_engine(test: Test) -> None:
    async def run() -> None:
        async with AsyncEngine("demo", **OPTIONS) as engine:
            await test(engine)

    asyncio.run(run())


class Running:
    """An engine that several tests share, with the event loop that it belongs to."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self.engine = AsyncEngine("demo", **OPTIONS)

    def run(self, test: Test) -> None:
        self._runner.run(test(self.engine))


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    with asyncio.Runner() as runner:
        running = Running(runner)
        runner.run(running.engine.start())
        yield running
        runner.run(running.engine.stop())


async def last(engine: AsyncEngine, prompt: Any, params: SamplingParams, **options: Any) -> Any:
    return [output async for output in engine.generate(prompt, params, **options)][-1]


def test_outputs_grow_to_what_the_offline_door_gives() -> None:
    expected = LLM("demo", **OPTIONS).generate(["A latte", "Hi"], GREEDY, use_tqdm=False)

    async def test(engine: AsyncEngine) -> None:
        texts = [o.outputs[0].text async for o in engine.generate("A latte", GREEDY)]
        assert texts[-1] == expected[0].outputs[0].text
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        both = await asyncio.gather(last(engine, "A latte", GREEDY), last(engine, "Hi", GREEDY))
        assert [o.outputs[0].text for o in both] == [o.outputs[0].text for o in expected]
        assert [o.finished for o in both] == [True, True]

    with_engine(test)


@pytest.mark.parametrize(
    "values",
    [
        {"bad_words": ["coffee", "milk", " the"], "forbidden_token_ids": [20, 458]},
        {"allowed_token_ids": list(range(300, 900)), "truncate_prompt_tokens": 2},
        {"n": 2, "best_of": 4, "temperature": 1.0, "seed": 6},
    ],
)
def test_bans_and_choices_reach_the_engines_process(
    values: dict[str, Any], engine: Running
) -> None:
    params = GREEDY.with_values(**values)
    (expected,) = LLM("demo", **OPTIONS).generate("A latte with", params, use_tqdm=False)

    async def test(engine: AsyncEngine) -> None:
        outputs = [output async for output in engine.generate("A latte with", params)]
        assert [o.token_ids for o in outputs[-1].outputs] == [o.token_ids for o in expected.outputs]
        assert outputs[-1].prompt_token_ids == expected.prompt_token_ids
        if params.best_of:
            assert len(outputs) == 1
            assert outputs[0].finished

    engine.run(test)


def test_ends_leave_nothing_behind() -> None:
    long = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)

    async def test(engine: AsyncEngine) -> None:
        aborted = asyncio.create_task(last(engine, "A", long, request_id="mine"))
        while not engine.streams:
            await asyncio.sleep(0.001)
        with pytest.raises(RequestError, match="in use"):
            await last(engine, "A", long, request_id="mine")
        await engine.abort("mine")
        await engine.abort("never there")
        assert (await aborted).outputs[0].finish_reason == "abort"
        async for _ in engine.generate("A", long):
            break  # leaving the loop ends it
        cancelled = asyncio.create_task(last(engine, "A", long))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        with pytest.raises(RequestError):
            await last(engine, [10**9], GREEDY)
        await asyncio.sleep(0.2)
        assert not engine.streams
        assert engine.admission.num_requests == engine.admission.num_tokens == 0
        assert engine.stats.num_used_blocks == engine.stats.num_running == 0

    with_engine(test)


def test_death_ends_every_request_and_the_engine_comes_back() -> None:
    long = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)

    async def test(engine: AsyncEngine) -> None:
        told: list[StepStats] = []
        engine.on_stats = told.append
        running = [asyncio.create_task(last(engine, "A", long)) for _ in range(6)]
        while not engine.stats.num_running:
            await asyncio.sleep(0.01)
        assert engine.engine_pid is not None
        os.kill(engine.engine_pid, signal.SIGKILL)
        found = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(error, EngineDeadError) for error in found)
        with pytest.raises(OverloadedError, match="not ready"):
            await last(engine, "A", GREEDY)
        assert told[-1] == StepStats()  # no figure of what is gone
        while not engine.is_ready:
            await asyncio.sleep(0.05)
        assert told[-1] == StepStats(num_blocks=told[0].num_blocks)
        assert (await last(engine, "A", GREEDY)).finished

    with_engine(test)


@pytest.mark.parametrize(
    "params",
    [{"stop": ["\ud83d"]}, {"extra_args": {"x": object()}}, {"extra_args": {"x": 2**70}}],
    ids=["half a character", "object", "large number"],
)
def test_what_no_message_can_hold_is_refused_and_leaves_nothing(
    engine: Running, params: dict[str, Any]
) -> None:
    async def test(engine: AsyncEngine) -> None:
        with pytest.raises(RequestError, match="plain values"):
            await last(engine, "A", SamplingParams(**params))
        assert not engine.streams
        assert engine.idle_s() == engine.admission.num_requests == engine.admission.num_tokens == 0

    engine.run(test)


def test_limits_beyond_64_bits_limit_nothing(engine: Running) -> None:
    params = SamplingParams(temperature=0, max_tokens=2**70, top_k=2**70, stop=["a", "e"])

    async def test(engine: AsyncEngine) -> None:
        assert (await last(engine, "A latte", params)).finished

    engine.run(test)


LARGE = "A latte " * 600  # so that it is tokenized in the pool


def test_request_that_is_aborted_while_it_is_tokenized_ends(engine: Running) -> None:
    async def test(engine: AsyncEngine) -> None:
        aborted = asyncio.create_task(last(engine, LARGE, GREEDY, request_id="mine"))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="in use"):
            await last(engine, "A", GREEDY, request_id="mine")
        await engine.abort("mine")

        output = await aborted

        assert [o.finish_reason for o in output.outputs] == ["abort"]
        assert output.outputs[0].token_ids == []
        assert (await last(engine, "A", GREEDY, request_id="mine")).finished
        assert engine.admission.num_requests == engine.admission.num_tokens == 0

    engine.run(test)


def test_ids_of_the_callers_own_do_not_meet_those_that_are_given(engine: Running) -> None:
    async def test(engine: AsyncEngine) -> None:
        taken = [f"quire-{n}" for n in range(200)]
        streams = [await engine.submit("Hi", GREEDY, request_id=i) for i in taken[:100]]
        try:
            assert (await last(engine, "A latte", GREEDY)).finished
        finally:
            for stream in streams:
                stream.close()

    engine.run(test)


def test_second_start_is_refused_and_the_first_goes_on(engine: Running) -> None:
    async def test(engine: AsyncEngine) -> None:
        pid = engine.engine_pid
        with pytest.raises(ConfigError, match="started already"):
            await engine.start()
        assert engine.engine_pid == pid
        assert (await last(engine, "Hi", GREEDY)).finished

    engine.run(test)


def test_use_after_the_end_says_so() -> None:
    async def run() -> None:
        engine = AsyncEngine("demo", **OPTIONS)
        await engine.start()
        coming = [asyncio.create_task(last(engine, LARGE, GREEDY)) for _ in range(8)]
        await asyncio.sleep(0)
        await engine.stop()
        await engine.stop()
        found = await asyncio.gather(*coming, return_exceptions=True)
        assert all(isinstance(error, (EngineDeadError, RequestError)) for error in found), found
        for asked in (last(engine, "A", GREEDY), last(engine, LARGE, GREEDY), engine.render([])):
            with pytest.raises(EngineDeadError):
                await asked
        assert engine.admission.num_requests == 0

    asyncio.run(run())


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.5])
def test_start_that_is_cancelled_leaves_nothing(
    delay_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def run() -> None:
        engine = AsyncEngine("demo", **OPTIONS)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(delay_s), engine:
                pass
        await has_ended(engine.engine_pid)

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_stop_ends_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def run() -> None:
        engine = AsyncEngine("demo", **OPTIONS)
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0.3)
        await engine.stop(0.1)
        with pytest.raises(EngineStartError, match="stopped before"):
            await asyncio.wait_for(starting, 5)
        await has_ended(engine.engine_pid)

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_full_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", fail)

    async def run() -> None:
        with pytest.raises(EngineStartError, match="No space left"):
            async with AsyncEngine("demo", **OPTIONS):
                pass

    asyncio.run(run())


async def has_ended(pid: int | None) -> None:
    """Wait until a process is gone."""
    async with asyncio.timeout(5):
        while pid is not None and Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.01)
