"""Feed the engine from a socket and send back what each step gave."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

import msgspec
import zmq

from quire.errors import RequestError
from quire.request import FinishReason, Request, SequenceUpdate
from quire.server.messages import (
    Abort,
    Add,
    Finish,
    Ready,
    Refused,
    Stepped,
    StepStats,
    Stop,
    ToEngine,
    decode_to_engine,
    encode,
    request_of,
    update_of,
)

# How long an idle engine waits for a form before it looks for messages again.
FORM_WAIT_S = 0.005


class Served(Protocol):
    """What the loop needs of an engine; a test double may stand in for it."""

    def add_request(self, request: Request) -> None: ...
    def begin_form(self, request: Request) -> Future[None] | None: ...
    def abort(self, request_id: str) -> None: ...
    def finish_sequence(self, request_id: str, index: int, reason: FinishReason) -> None: ...
    def has_unfinished(self) -> bool: ...
    def step(self) -> list[SequenceUpdate]: ...
    def stats(self) -> StepStats: ...
    def started(self) -> list[str]: ...
    def ready(self, phases_s: dict[str, float]) -> Ready: ...


class EngineLoop:
    """One engine and the socket that it serves. Messages are taken in before every step."""

    def __init__(self, engine: Served, socket: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._socket = socket
        self._stopped = False
        # Requests whose form is being compiled; they are added in the order of their readiness.
        self._forming: dict[str, tuple[Request, Future[None]]] = {}

    def run(self, phases_s: dict[str, float]) -> None:
        """Serve until `Stop` comes. Raises: EngineDeadError if a step fails as a whole."""
        engine = self._engine
        self._socket.send(encode(engine.ready(phases_s)))
        while not self._stopped:
            was_idle = not engine.has_unfinished()
            self._receive(wait=was_idle and not self._forming)
            self._add_formed(wait_s=FORM_WAIT_S if was_idle else 0.0)
            if engine.has_unfinished():
                updates = [update_of(update) for update in engine.step()]
                self._socket.send(encode(Stepped(updates, engine.stats(), engine.started())))
            elif not was_idle:
                # What was left was aborted: no step will tell that all blocks are free.
                stats = msgspec.structs.replace(engine.stats(), num_tokens=0, num_seqs=0)
                self._socket.send(encode(Stepped([], stats, [])))

    def _receive(self, *, wait: bool) -> None:
        """Take in all messages that are there; with `wait`, at least one."""
        flags = 0 if wait else zmq.NOBLOCK
        while not self._stopped:
            try:
                data = self._socket.recv(flags)
            except zmq.Again:
                return
            self._take(decode_to_engine(data))
            flags = zmq.NOBLOCK

    def _take(self, message: ToEngine) -> None:
        engine = self._engine
        match message:
            case Add():
                self._add(message)
            case Abort():
                for request_id in message.request_ids:
                    self._forming.pop(request_id, None)
                    engine.abort(request_id)
            case Finish():
                for request_id, index in message.sequences:
                    engine.finish_sequence(request_id, index, FinishReason.STOP)
            case Stop():
                self._stopped = True

    def _add(self, message: Add) -> None:
        request = request_of(message, time.monotonic())
        form = self._engine.begin_form(request)
        if form is None:
            self._add_request(request)
        else:
            self._forming[request.request_id] = (request, form)

    def _add_formed(self, *, wait_s: float) -> None:
        """Add the requests whose forms are compiled; steps of others do not wait for them."""
        if not self._forming:
            return
        wait([form for _, form in self._forming.values()], wait_s, FIRST_COMPLETED)
        for request_id, (request, form) in list(self._forming.items()):
            if form.done():
                del self._forming[request_id]
                self._add_request(request)

    def _add_request(self, request: Request) -> None:
        try:
            self._engine.add_request(request)
        except RequestError as error:
            refused = Refused(request.request_id, str(error), error.parameter)
            self._socket.send(encode(refused))
