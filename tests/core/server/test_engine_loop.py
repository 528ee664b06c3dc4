"""What the engine's process says, and when."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import zmq
from attrs import evolve

from quire.request import FinishReason, Request, SamplingParams, SequenceUpdate
from quire.server.engine_loop import EngineLoop
from quire.server.messages import (
    Abort,
    FromEngine,
    Ready,
    Stepped,
    StepStats,
    Stop,
    decode_from_engine,
    encode,
    encoded_add,
)

REQUEST = Request(
    request_id="r", prompt_token_ids=(1, 2), params=SamplingParams(), max_tokens=99, seed=0
)


class Endless:
    """An engine that computes two tokens a step for a request until it is aborted."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.is_in_step = threading.Semaphore(0)
        self.may_end_step = threading.Semaphore(0)

    def begin_form(self, request: Request) -> Future[None] | None:
        return None

    def add_request(self, request: Request) -> None:
        self.running.add(request.request_id)

    def abort(self, request_id: str) -> None:
        self.running.discard(request_id)

    def finish_sequence(self, request_id: str, index: int, reason: FinishReason) -> None:
        self.abort(request_id)

    def has_unfinished(self) -> bool:
        return bool(self.running)

    def step(self) -> list[SequenceUpdate]:
        self.is_in_step.release()
        self.may_end_step.acquire()
        return []

    def stats(self) -> StepStats:
        return StepStats(num_running=len(self.running), num_tokens=2, num_seqs=1)

    def started(self) -> list[str]:
        return []

    def ready(self, phases_s: dict[str, float]) -> Ready:
        return Ready(9, 9, 9, phases_s, [])


def test_step_is_told_of_once_also_when_all_that_ran_is_aborted() -> None:
    context = zmq.Context()
    server, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    server.rcvtimeo = 5000
    server.bind("inproc://engine")
    theirs.connect("inproc://engine")
    engine = Endless()
    thread = threading.Thread(target=EngineLoop(engine, theirs).run, args=({},))

    def hear() -> FromEngine:
        return decode_from_engine(server.recv())

    thread.start()
    try:
        assert isinstance(hear(), Ready)
        server.send(encoded_add(REQUEST))
        engine.may_end_step.release()
        first = hear()
        for _ in range(2):
            assert engine.is_in_step.acquire(timeout=5)
        server.send(encode(Abort(["r"])))
        engine.may_end_step.release()
        found = [first, hear(), hear()]
    finally:
        server.send(encode(Stop()))
        engine.may_end_step.release()
        thread.join(5)
        context.destroy(0)

    assert all(isinstance(message, Stepped) for message in found)
    tokens = [message.stats.num_tokens for message in found if isinstance(message, Stepped)]
    assert tokens == [2, 2, 0]


class Forming(Endless):
    """An engine whose requests have forms that are never ready but by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: dict[str, Future[None]] = {}
        self.has_begun = threading.Semaphore(0)

    def begin_form(self, request: Request) -> Future[None] | None:
        if request.request_id == "free":
            return None
        self.forms[request.request_id] = Future()
        self.has_begun.release()
        return self.forms[request.request_id]


def test_a_form_that_is_compiled_keeps_no_step_and_an_aborted_one_is_never_added() -> None:
    context = zmq.Context()
    server, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    server.rcvtimeo = 5000
    server.bind("inproc://forming")
    theirs.connect("inproc://forming")
    engine = Forming()
    thread = threading.Thread(target=EngineLoop(engine, theirs).run, args=({},))
    thread.start()
    try:
        server.recv()
        for request_id in ("a", "b", "free"):
            server.send(encoded_add(evolve(REQUEST, request_id=request_id)))
        assert engine.is_in_step.acquire(timeout=5)  # though two forms are not ready
        running = set(engine.running)
        server.send(encode(Abort(["b"])))
        for form in engine.forms.values():
            form.set_result(None)
        engine.may_end_step.release()
        assert engine.is_in_step.acquire(timeout=5)
        later = set(engine.running)
    finally:
        server.send(encode(Stop()))
        engine.may_end_step.release()
        thread.join(5)
        context.destroy(0)

    assert running == {"free"}
    assert later == {"free", "a"}
