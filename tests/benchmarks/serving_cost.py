"""What serving costs on top of the engine: `python tests/benchmarks/serving_cost.py [--fake]`.

Without --fake: 64 streams against `quire serve demo` and the same requests in `LLM.generate`, one
compute thread in both, and the time that is added to a first token. With --fake: a test double of
the engine that answers at once, the server on one core and everything else on the other; prints
how the server's time splits.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import selectors
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import Factory, define

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "end_to_end"))

from serving import Server, serving  # noqa: E402

SERVER_CORE, OTHER_CORE = 0, 1
NUM_STREAMS = 64
PAUSE_S = 0.02


@define
class Answer:
    """What a raw socket saw of one streamed answer."""

    sent_s: float = 0.0
    first_s: float = 0.0
    end_s: float = 0.0
    num_events: int = 0
    tail: bytes = b""

    @property
    def num_tokens(self) -> int:
        """Tokens, as the usage says."""
        found = json.loads(self.tail.split(b"data: ")[-2])
        return int(found["usage"]["completion_tokens"])


@define
class Connection:
    """One connection that asks again as soon as it is answered."""

    socket: socket.socket
    answer: Answer = Factory(Answer)


class Client:
    """Keeps some streams busy; looks at bytes only, so that it costs little."""

    def __init__(self, port: int, bodies: Sequence[bytes], num_streams: int) -> None:
        self._port = port
        self._bodies = collections.deque(bodies)
        self._selector = selectors.DefaultSelector()
        self._open = min(num_streams, len(bodies))
        self.answers: list[Answer] = []

    def run(self) -> float:
        """Ask everything and return how long it took."""
        connections = [
            Connection(socket.create_connection(("127.0.0.1", self._port)))
            for _ in range(self._open)
        ]
        begin_s = time.perf_counter()
        for connection in connections:
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)
            self._ask(connection)
        while self._open:
            for key, _ in self._selector.select():
                self._read(key.data)
        return time.perf_counter() - begin_s

    def _ask(self, connection: Connection) -> None:
        body = self._bodies.popleft()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        connection.answer = Answer(sent_s=time.perf_counter())
        connection.socket.sendall(head.encode() + body)

    def _read(self, connection: Connection) -> None:
        data = connection.socket.recv(1 << 18)
        answer = connection.answer
        if not data:
            raise SystemExit("the server closed a connection")
        count = data.count(b"data: ")
        if count and not answer.num_events:
            answer.first_s = time.perf_counter()
        answer.num_events += count
        answer.tail = (answer.tail + data)[-2048:]
        if not answer.tail.endswith(b"0\r\n\r\n"):
            return
        answer.end_s = time.perf_counter()
        self.answers.append(answer)
        if self._bodies:
            self._ask(connection)
        else:
            self._selector.unregister(connection.socket)
            connection.socket.close()
            self._open -= 1


def body_of(prompt: list[int], max_tokens: int) -> bytes:
    """Return a streamed completion's body."""
    fields: dict[str, Any] = {"model": "demo", "prompt": prompt, "max_tokens": max_tokens}
    fields |= {"temperature": 0, "ignore_eos": True, "stream": True}
    return json.dumps({**fields, "stream_options": {"include_usage": True}}).encode()


def prompts_of(count: int, length: int, seed: int) -> list[list[int]]:
    """Return prompts that share nothing."""
    rng = random.Random(seed)
    return [[rng.randrange(300, 4000) for _ in range(length)] for _ in range(count)]


def run_client(port: int, bodies: Sequence[bytes], num_streams: int) -> tuple[float, list[Answer]]:
    """Return the seconds and the answers."""
    client = Client(port, bodies, num_streams)
    return client.run(), client.answers


def measure_real(num_requests: int, max_tokens: int) -> dict[str, Any]:
    """Compare the server with `LLM.generate`, before and after."""
    from quire import LLM, SamplingParams

    llm = LLM("demo", num_threads=1)
    # As in a comparison on equal terms, neither run finds the other's prompts.
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)

    def offline(seed: int) -> float:
        prompts: list[Any] = [{"prompt_token_ids": p} for p in prompts_of(num_requests, 48, seed)]
        begin_s = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        took_s = time.perf_counter() - begin_s
        return sum(len(output.outputs[0].token_ids) for output in outputs) / took_s

    def first_offline(seed: int) -> list[float]:
        one = SamplingParams(temperature=0, max_tokens=1)
        times = []
        for prompt in prompts_of(30, 48, seed):
            begin_s = time.perf_counter()
            llm.generate([{"prompt_token_ids": prompt}], one, use_tqdm=False)
            times.append(time.perf_counter() - begin_s)
            time.sleep(PAUSE_S)
        return times

    def first_served(server: Server, seed: int) -> list[float]:
        times = []
        for prompt in prompts_of(30, 48, seed):
            _, (answer,) = run_client(server.port, [body_of(prompt, 1)], 1)
            times.append(answer.first_s - answer.sent_s)
            time.sleep(PAUSE_S)
        return times

    offline(1)
    rates: dict[str, list[float]] = {"offline": [], "served": []}
    firsts: dict[str, list[float]] = {"offline": [], "served": []}
    with serving() as server:
        for turn in range(3):
            rates["offline"].append(offline(10 + turn))
            bodies = [body_of(p, max_tokens) for p in prompts_of(num_requests, 48, 20 + turn)]
            took_s, answers = run_client(server.port, bodies, NUM_STREAMS)
            rates["served"].append(sum(a.num_tokens for a in answers) / took_s)
            firsts["offline"] += first_offline(30 + turn)
            firsts["served"] += first_served(server, 40 + turn)
    ratios = [s / o for s, o in zip(rates["served"], rates["offline"], strict=True)]
    median = {name: statistics.median(times) for name, times in firsts.items()}
    return {
        "offline tokens/s": [round(rate) for rate in rates["offline"]],
        "served tokens/s": [round(rate) for rate in rates["served"]],
        "served / offline": [round(ratio, 3) for ratio in ratios],
        "first token offline ms": round(1e3 * median["offline"], 2),
        "first token served ms": round(1e3 * median["served"], 2),
        "added to the first token ms": round(1e3 * (median["served"] - median["offline"]), 2),
    }


def cpu_s(pid: int) -> float:
    """Return the processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_fake(num_requests: int, max_tokens: int, *, profile: bool) -> dict[str, Any]:
    """Measure the server's process alone."""
    os.sched_setaffinity(0, {OTHER_CORE})
    command = ["taskset", "-c", str(SERVER_CORE), sys.executable, str(HERE / "serve_fake.py")]
    os.environ["PYTHONPATH"] = str(HERE)
    with serving(command=(*command, *(["--profile"] if profile else []))) as server:
        engine = server.engine_pid()
        for task in Path(f"/proc/{engine}/task").iterdir():
            os.sched_setaffinity(int(task.name), {OTHER_CORE})
        bodies = [body_of(p, max_tokens) for p in prompts_of(num_requests, 8, 1)]
        run_client(server.port, bodies[:NUM_STREAMS], NUM_STREAMS)
        before_s = cpu_s(server.process.pid)
        took_s, answers = run_client(server.port, bodies, NUM_STREAMS)
        busy = (cpu_s(server.process.pid) - before_s) / took_s
        tokens = sum(answer.num_tokens for answer in answers)
        events = sum(answer.num_events for answer in answers)
    parts: dict[str, int] = json.loads(server.read_output())["parts"]
    total = sum(parts.values()) or 1
    split = sorted(parts.items(), key=lambda item: -item[1])
    return {
        "tokens/s": round(tokens / took_s),
        "events/s": round(events / took_s),
        "server's core busy": round(busy, 2),
        "tokens an event": round(tokens / events, 2),
        "split": {name: f"{count / total:.0%}" for name, count in split},
    }


def main() -> None:
    """Print one line of JSON a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    if not arguments.fake:
        print(json.dumps(measure_real(arguments.requests, arguments.max_tokens), indent=1))
        return
    # At once, tokens gather while the server writes; at a pace, each is an event of its own.
    for pace in ("inf", "400"):
        os.environ["FAKE_STEPS_PER_S"] = pace
        for profile in (False, True):
            found = measure_fake(arguments.requests, arguments.max_tokens, profile=profile)
            print(json.dumps({"steps/s": pace, **found}))


if __name__ == "__main__":
    main()
