"""What breaks servers, with real processes: clients that leave, an engine that dies, an end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from serving import START_S, Server, children, events_of, is_running, serving

LONG: dict[str, Any] = {
    "model": "demo",
    "prompt": "Hi",
    "max_tokens": 1500,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-num-seqs", "8", "--stall-timeout-s", "1") as running:
        yield running


@pytest.fixture
def fresh() -> Iterator[Server]:
    with serving("--max-num-seqs", "8", "--max-queued-requests", "4096") as running:
        yield running


async def leave_after(url: str, body: dict[str, Any], delay_s: float) -> None:
    """Ask and go away."""
    async with httpx.AsyncClient(timeout=60) as client:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await client.post(url, json=body)


def run_all(coroutines: list[Any]) -> list[Any]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*coroutines, return_exceptions=True)

    return asyncio.run(gather())


async def read_stream(url: str, body: dict[str, Any]) -> tuple[int, str]:
    """Return the status and the whole text of an answer."""
    async with httpx.AsyncClient(timeout=120) as client:
        answer = await client.post(url, json=body)
        return answer.status_code, answer.text


def ends_once(status: int, text: str) -> bool:
    """Whether an answer ends in exactly one way: complete, or with an error."""
    if status != 200 or not text.startswith("data"):
        return status in (200, 500, 503)
    events = events_of(text)
    reasons = [
        event["choices"][0]["finish_reason"]
        for event in events
        if isinstance(event, dict) and event.get("choices")
    ]
    is_complete = events[-1] == "[DONE]" and sum(r is not None for r in reasons) == 1
    has_error = isinstance(events[-1], dict) and "error" in events[-1]
    return is_complete != has_error


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("state", ["queued", "decoding"])
def test_client_that_leaves_frees_everything(
    server: Server, stream: bool, n: int, state: str
) -> None:
    url = server.url + "/v1/completions"
    body = {**LONG, "stream": stream, "n": n}
    before = server.figure("quire:requests_total")
    count = 12 if state == "queued" else 1  # eight sequences run at once

    run_all([leave_after(url, body, 0.3 if count == 1 else 1.0) for _ in range(count)])

    server.wait_until_idle(timeout_s=1.0)
    assert server.figure("quire:requests_total") >= before + count


def test_client_that_leaves_during_its_prompt_frees_everything(server: Server) -> None:
    body = {**LONG, "prompt": [random.Random(1).randrange(5, 4096) for _ in range(2000)]}

    run_all([leave_after(server.url + "/v1/completions", body, 0.02) for _ in range(4)])

    server.wait_until_idle(timeout_s=1.0)


def rss_of(server: Server) -> int:
    """Return the memory of the server and what it started, in pages."""
    pids = [server.process.pid, *(pid for pid, _ in children(server.process.pid))]
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)


@pytest.mark.slow
def test_200_clients_leave_at_random_and_memory_comes_back() -> None:
    # The system gives a KV cache its pages when they are first written, which is no leak: this one
    # is so small that the first turns write all of it.
    cache = ("--kv-cache-memory-bytes", "8MiB", "--max-model-len", "1700")
    with serving("--max-num-seqs", "8", *cache) as server:
        memory = []
        for turn in range(4):
            rng = random.Random(turn)
            bodies = [{**LONG, "stream": rng.random() < 0.5, "max_tokens": 200} for _ in range(200)]
            url = server.url + "/v1/completions"
            run_all([leave_after(url, body, rng.uniform(0.0, 2.0)) for body in bodies])
            server.wait_until_idle(timeout_s=5.0)
            memory.append(rss_of(server))

        assert memory[-1] <= 1.02 * memory[1], memory


def test_log_on_a_full_disk_costs_no_request() -> None:
    with open("/dev/full", "wb") as full:
        check_serves_without_a_log(full.fileno())


@pytest.mark.slow
def test_log_that_nobody_reads_costs_no_request() -> None:
    unread, log = os.pipe()
    fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 4096)
    try:
        check_serves_without_a_log(log)
    finally:
        os.close(log)
        os.close(unread)


def check_serves_without_a_log(log: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Server("--port", str(port), log_to=log)
    server.port = port
    try:
        wait_until_healthy(server)
        with httpx.Client(base_url=server.url) as client:
            for _ in range(100):
                body = {**LONG, "max_tokens": 1}
                assert client.post("/v1/completions", json=body).status_code == 200
    finally:
        assert server.stop() == 0


def wait_until_healthy(server: Server) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(server.url + "/health").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the server did not become ready")


JUMPING_CLOCK = """
import random, sys, time
rng, real = random.Random(1), time.time
time.time = lambda: real() + rng.uniform(-1e6, 1e6)
from quire.cli.main import main
sys.argv = ["quire", "serve", "demo", "--port", "0", "--keep-alive-s", "1"]
sys.exit(main())
"""


@pytest.mark.slow
def test_clock_that_jumps_ends_no_request() -> None:
    with serving(command=(sys.executable, "-c", JUMPING_CLOCK)) as server:
        url = server.url + "/v1/completions"
        body = {**LONG, "max_tokens": 200, "stream": True}

        answers = run_all([read_stream(url, body) for _ in range(8)])

        assert all(status == 200 and ends_once(status, text) for status, text in answers)
        seconds = server.figure("vllm:e2e_request_latency_seconds_sum")
        assert 0 < seconds < 8 * 60
        server.wait_until_idle()


def test_stalled_engine_fails_health_until_it_goes_on(server: Server) -> None:
    pid = server.engine_pid()
    with ThreadPoolExecutor(1) as pool:
        os.kill(pid, signal.SIGSTOP)
        try:
            asked = pool.submit(
                httpx.post,
                server.url + "/v1/completions",
                json={**LONG, "max_tokens": 3},
                timeout=60,
            )
            server.wait_for_log("no step for", timeout_s=20)
            assert httpx.get(server.url + "/health").status_code == 503
            assert "queued" in server.read_log()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert asked.result().status_code == 200
    server.wait_for_log("makes steps again", timeout_s=20)
    assert httpx.get(server.url + "/health").status_code == 200


def test_killed_engine_answers_everyone_and_comes_back(fresh: Server) -> None:
    url = fresh.url + "/v1/completions"

    async def run() -> list[Any]:
        asked = [read_stream(url, {**LONG, "stream": i % 2 == 0}) for i in range(50)]
        tasks = [asyncio.create_task(one) for one in asked]
        await asyncio.sleep(1.0)
        os.kill(fresh.engine_pid(), signal.SIGKILL)
        return await asyncio.gather(*tasks)

    answers = asyncio.run(run())

    assert all(ends_once(*answer) for answer in answers)
    assert any(status == 500 or "engine_dead" in text for status, text in answers)
    fresh.wait_for_log("the engine is ready again")
    assert httpx.post(url, json={**LONG, "max_tokens": 2}).status_code == 200
    assert "SIGKILL" in fresh.read_log()
    assert fresh.figure("quire:engine_restarts_total") == 1
    fresh.wait_until_idle()


def test_engine_that_dies_too_often_ends_the_server_with_an_error() -> None:
    with serving("--max-engine-restarts", "0") as server:
        os.kill(server.engine_pid(), signal.SIGKILL)

        assert server.process.wait(30) == 1
        assert "given up" in server.read_log()


def wait_until_running(server: Server, count: int) -> None:
    end_s = time.monotonic() + 30
    while server.figure("vllm:num_requests_running") < count:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_sigterm_finishes_what_runs(fresh: Server) -> None:
    url = fresh.url + "/v1/completions"

    async def run() -> list[Any]:
        asked = [read_stream(url, {**LONG, "max_tokens": 500, "stream": True}) for _ in range(8)]
        tasks = [asyncio.create_task(one) for one in asked]
        await asyncio.to_thread(wait_until_running, fresh, 8)
        fresh.process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*tasks)

    below = [pid for pid, _ in children(fresh.process.pid)]
    answers = asyncio.run(run())

    assert all(status == 200 and events_of(text)[-1] == "[DONE]" for status, text in answers)
    assert fresh.process.wait(20) == 0
    assert not any(is_running(pid) for pid in below)


def test_sigterm_ends_what_takes_too_long_with_an_error() -> None:
    with serving("--shutdown-timeout-s", "0.5") as server:
        url = server.url + "/v1/completions"

        async def run() -> list[Any]:
            asked = [read_stream(url, {**LONG, "n": 4, "stream": i == 0}) for i in range(2)]
            tasks = [asyncio.create_task(one) for one in asked]
            await asyncio.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

        (_, streamed), (status, _) = asyncio.run(run())

        assert "error" in events_of(streamed)[-1]  # type: ignore[operator]
        assert status == 500
        assert server.process.wait(10) == 0


def test_sigterm_does_not_wait_for_an_idle_websocket(fresh: Server) -> None:
    async def run() -> int:
        url = fresh.url.replace("http", "ws") + "/v1/chat/completions"
        async with websockets.connect(url) as client:
            fresh.process.send_signal(signal.SIGTERM)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await asyncio.wait_for(client.recv(), 5)
            return closed.value.rcvd.code if closed.value.rcvd else 0

    assert asyncio.run(run()) == 1013
    assert fresh.process.wait(5) == 0


def test_second_sigterm_ends_at_once(fresh: Server) -> None:
    below = [pid for pid, _ in children(fresh.process.pid)]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, fresh.url + "/v1/completions", json=LONG, timeout=60)
        time.sleep(0.5)
        fresh.process.send_signal(signal.SIGTERM)
        fresh.wait_for_log("shutting down")
        fresh.process.send_signal(signal.SIGTERM)

        assert fresh.process.wait(5) == 1
        assert isinstance(asked.exception(), httpx.HTTPError)
    time.sleep(0.5)
    assert not any(is_running(pid) for pid in below)


def test_server_that_is_killed_leaves_no_process() -> None:
    with serving() as server:
        below = [pid for pid, _ in children(server.process.pid)]
        server.process.kill()
        server.process.wait()
        end_s = time.monotonic() + 10
        while any(is_running(pid) for pid in below):
            assert time.monotonic() < end_s
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("num_taken", "num_sent"), [(100, 400), pytest.param(500, 2000, marks=pytest.mark.slow)]
)
def test_full_queue_answers_503_and_serves_the_rest(num_taken: int, num_sent: int) -> None:
    limits = ("--max-num-seqs", "8", "--max-queued-requests", str(num_taken - 8))
    with serving(*limits) as server:
        url = server.url + "/v1/completions"

        async def run() -> list[int]:
            bounds = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(timeout=300, limits=bounds) as client:

                async def one() -> int:
                    answer = await client.post(url, json={**LONG, "max_tokens": 4})
                    if answer.status_code == 503:
                        assert answer.headers["retry-after"]
                        assert answer.json()["error"]["code"] == "queue_full"
                    return answer.status_code

                return await asyncio.gather(*[one() for _ in range(num_sent)])

        statuses = asyncio.run(run())

        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= num_taken
        server.wait_until_idle()
