"""The engine behind `await`: requests in, outputs out, while the engine runs in its own process."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from typing import Any, cast

from quire.config import EngineConfig
from quire.errors import ConfigError, EngineDeadError, OverloadedError, RequestError
from quire.frontend import Frontend
from quire.pooling_params import PoolingParams
from quire.request import Request, RequestOutput, SamplingParams, SequenceUpdate
from quire.server.admission import Admission, ServingLimits
from quire.server.engine_client import ENGINE_MODULE, Death, EngineClient, EngineStartError
from quire.server.messages import (
    Abort,
    Finish,
    FromEngine,
    Ready,
    Refused,
    Stepped,
    StepStats,
    encoded_add,
)
from quire.server.stream import News, Stream
from quire.server.work_pools import WorkPools
from quire.text.input_processor import RenderedChat, check_request_id, prompt_text
from quire.text.output_processor import OutputProcessor
from quire.vllm_keywords import without_neutral

log = logging.getLogger("quire.server")

RESTART_WINDOW_S = 3600.0
STOP_GRACE_S = 5.0


class AsyncEngine:
    """A model in a process of its own, for programs that run an event loop.

    `AsyncEngine(model, **options)` takes the options of `LLM`. Use it as

        async with AsyncEngine("demo") as engine:
            async for output in engine.generate("Hello", SamplingParams(max_tokens=8)):
                ...

    All methods belong to the event loop that started it.
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Check options and files. Raises: ConfigError, CheckpointError or PluginError."""
        config = EngineConfig.from_options({"model": str(model), **without_neutral(options)})
        self._prepare(Frontend(config), ServingLimits(), ENGINE_MODULE)

    @classmethod
    def from_frontend(
        cls, frontend: Frontend, limits: ServingLimits, *, module: str = ENGINE_MODULE
    ) -> AsyncEngine:
        """Make one whose files were checked; `module` is what the engine's process runs."""
        engine = cls.__new__(cls)
        engine._prepare(frontend, limits, module)
        return engine

    def _prepare(self, frontend: Frontend, limits: ServingLimits, module: str) -> None:
        self.frontend = frontend
        self.limits = limits
        self.stats = StepStats()
        self.last_step_s = time.monotonic()
        self.on_stats: Callable[[StepStats], None] = lambda stats: None
        self.on_restart: Callable[[], None] = lambda: None
        self.on_given_up: Callable[[Death], None] = lambda death: None
        running = frontend.config.scheduler.max_num_seqs
        self.admission = Admission(
            max_requests=running + limits.max_queued_requests,
            max_tokens=limits.max_queued_tokens,
        )
        self._module = module
        self._outputs = OutputProcessor(frontend.tokenizer)
        self._streams: dict[str, Stream] = {}
        self._in_pool: dict[str, bool] = {}  # being tokenized; whether it was aborted meanwhile
        self._num_incomplete = 0  # streams that the engine still works for
        self._numbers = itertools.count()
        self._pools = WorkPools(
            for_texts=limits.tokenizer_pool_size, for_forms=frontend.num_form_checks
        )
        self._client: EngineClient | None = None
        self._is_ready = False
        self._deaths: deque[float] = deque()
        self._restart: asyncio.Task[None] | None = None
        self._stopped = False
        self._has_given_up = False

    async def __aenter__(self) -> AsyncEngine:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.stop()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken on."""
        return self._is_ready and not self._stopped

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id, None before the start."""
        return None if self._client is None else self._client.pid

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Every request that is not closed."""
        return tuple(self._streams.values())

    def idle_s(self) -> float:
        """Return for how long no step did anything although there is work; 0 without work."""
        return time.monotonic() - self.last_step_s if self._num_incomplete else 0.0

    # Start and end

    async def start(self) -> Ready:
        """Load the model. Raises: EngineStartError where the process ended instead."""
        if self._client is not None and self._client.is_alive:
            raise ConfigError("this engine was started already; make another one.")
        self._client = EngineClient(
            self.frontend.config.to_options(),
            on_message=self._take_message,
            on_death=self._take_death,
            module=self._module,
        )
        ready = await self._client.start()
        self.frontend.serve(ready.max_model_len)
        self.frontend.prepare_for_forms()
        self._take_stats(StepStats(num_blocks=ready.num_blocks))
        self._is_ready = True
        return ready

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """End the engine; requests that still run end with an error. May be called again."""
        self._stopped = True
        if self._restart is not None:
            self._restart.cancel()
        self.fail_all("the engine was stopped.")
        if self._client is not None:
            await self._client.stop(grace_s)
        self._pools.shutdown()
        self.frontend.close()

    def kill(self) -> None:
        """End the engine's process and the frontend's now, without a word."""
        self._stopped = True
        if self._client is not None:
            self._client.kill()
        self.frontend.close()

    # Requests

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yield all that a request has so far, whenever there is more.

        Leaving the loop ends the request. Raises: RequestError, OverloadedError, EngineDeadError.
        """
        params = sampling_params or self.frontend.sampling_params()
        stream = await self.submit(prompt, params, request_id=request_id, priority=priority)
        try:
            while not stream.is_finished:
                if await stream.next() and stream.has_output:
                    yield stream.output()
        finally:
            stream.close()

    async def abort(self, request_id: str) -> None:
        """End a request; its output ends with finish_reason `abort`. Unknown ids are no error."""
        if request_id in self._in_pool:
            self._in_pool[request_id] = True
        stream = self._streams.get(request_id)
        if stream is not None and not stream.is_complete:
            self._outputs.abort(request_id)
            self._end_in_engine(stream)
            stream.news.ring()

    async def submit(
        self,
        prompt: Any,
        params: SamplingParams | PoolingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        news: News | None = None,
    ) -> Stream:
        """Queue a request; its stream must be closed. Raises: RequestError, OverloadedError."""
        arrival_s = time.monotonic()
        self._check_ready()
        if request_id is None:
            request_id = self._new_id()
        self._check_unused(request_id)
        self.admission.take_request()
        try:
            options: dict[str, Any] = {
                "arrival_s": arrival_s,
                "priority": priority,
                "cache_salt": cache_salt,
            }
            process = functools.partial(
                self.frontend.inputs.process, prompt, params, request_id=request_id, **options
            )
            knows_form = self.frontend.knows_form(params)
            pool = self._pools.choose(prompt, params, knows_form=knows_form)
            if pool is None:
                return self._send(process(), prompt_text(prompt), news)
            work = self.in_pool(process, pool)
            return await self._submit_from_pool(request_id, work, prompt_text(prompt), news)
        except BaseException:
            self.admission.give_request()
            raise

    async def _submit_from_pool(
        self, request_id: str, work: Awaitable[Request], text: str | None, news: News | None
    ) -> Stream:
        self._in_pool[request_id] = False
        try:
            request = await work
        finally:
            was_aborted = self._in_pool.pop(request_id)
        stream = self._send(request, text, news)
        if was_aborted:
            await self.abort(request_id)
        return stream

    async def render(self, messages: Any, **options: Any) -> RenderedChat:
        """Return the prompt of a conversation. Raises: RequestError, ConfigError."""
        return await self.in_pool(lambda: self.frontend.render(messages, **options))

    async def in_pool(self, work: Callable[[], Any], pool: Executor | None = None) -> Any:
        """Run work in a thread, of the tokenizer's. Raises: EngineDeadError after `stop`."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if not self._stopped:
            try:
                return await loop.run_in_executor(pool or self._pools.texts, work)
            except asyncio.CancelledError:
                if not self._stopped or task is None or task.cancelling():
                    raise
        raise EngineDeadError("the engine was stopped.")

    def _send(self, request: Request, text: str | None, news: News | None) -> Stream:
        self._check_ready()
        assert self._client is not None, "an engine that is ready has a process"
        data = encoded_add(request)
        self.admission.take_tokens(len(request.prompt_token_ids))
        try:
            self._outputs.add_request(request, text)
        except BaseException:
            self.admission.give_tokens(len(request.prompt_token_ids))
            raise
        stream = Stream(request, self._outputs, on_close=self._close, news=news)
        if self._num_incomplete == 0:
            self.last_step_s = time.monotonic()
        self._num_incomplete += 1
        self._streams[request.request_id] = stream
        self._client.send_encoded(data)
        return stream

    def _check_ready(self) -> None:
        if self._has_given_up or self._stopped:
            raise EngineDeadError("the engine has ended; make a new one.")
        if not self.is_ready:
            raise OverloadedError(
                "the engine is not ready; try again soon.", code="not_ready", retry_after_s=2
            )

    def _new_id(self) -> str:
        """Return an id that no caller has taken for a request of its own."""
        ids = (f"quire-{number}" for number in self._numbers)
        return next(i for i in ids if i not in self._streams and i not in self._in_pool)

    def _check_unused(self, request_id: str) -> None:
        check_request_id(request_id)
        if request_id in self._streams or request_id in self._in_pool:
            raise RequestError(
                f"request id {request_id!r} is in use; give each request its own.",
                parameter="request_id",
            )

    def _close(self, stream: Stream) -> None:
        self._end_in_engine(stream)
        if self._streams.pop(stream.request_id, None) is not None:
            self._outputs.remove(stream.request_id)
            self.admission.give_request()

    def _end_in_engine(self, stream: Stream) -> None:
        if not stream.is_complete and self._client is not None:
            self._client.send(Abort([stream.request_id]))
        self._complete(stream)

    def _complete(self, stream: Stream) -> None:
        """Note that the engine has nothing more for a stream."""
        if not stream.is_complete:
            stream.is_complete = True
            self._num_incomplete -= 1
        self._leave_queue(stream)

    def _leave_queue(self, stream: Stream) -> None:
        if stream.is_queued:
            stream.is_queued = False
            self.admission.give_tokens(stream.num_prompt_tokens)

    # What the engine says

    def _take_message(self, message: FromEngine) -> None:
        if isinstance(message, Stepped):
            self._take_step(message, time.monotonic())
        elif isinstance(message, Refused):
            stream = self._streams.get(message.request_id)
            if stream is not None:
                self._complete(stream)
                stream.fail(RequestError(message.message, parameter=message.parameter))

    def _take_step(self, message: Stepped, now_s: float) -> None:
        if message.updates or message.stats.num_tokens:
            self.last_step_s = now_s
        processed = self._outputs.process(cast(list[SequenceUpdate], message.updates))
        if processed.to_finish and self._client is not None:
            self._client.send(Finish(list(processed.to_finish)))
        streams = self._streams
        for request_id in message.started:
            if request_id in streams:
                streams[request_id].scheduled_s = now_s - message.stats.step_time_s
        for request_id in processed.finished:
            self._complete(streams[request_id])
        for request_id in processed.changed:
            stream = streams[request_id]
            if stream.is_queued:
                self._leave_queue(stream)
            stream.notify(now_s)
        self._take_stats(message.stats)

    def _take_stats(self, stats: StepStats) -> None:
        self.stats = stats
        self.on_stats(stats)

    def _take_death(self, death: Death) -> None:
        """End every request with an error, and start the engine again if that may help."""
        log.error("%s", death.message, extra={"fields": {"traceback": death.traceback}})
        self._is_ready = False
        self._take_stats(StepStats())
        self.fail_all(f"the engine stopped: {death.message}.")
        if self._client is not None:
            self._client.close()
        if self._stopped:
            return
        now_s = time.monotonic()
        while self._deaths and now_s - self._deaths[0] > RESTART_WINDOW_S:
            self._deaths.popleft()
        self._deaths.append(now_s)
        if death.exit_code == 2 or len(self._deaths) > self.limits.max_engine_restarts:
            self._has_given_up = True
            self.on_given_up(death)
            return
        self._restart = asyncio.create_task(self._start_again())

    async def _start_again(self) -> None:
        log.warning("starting the engine again")
        try:
            await self.start()
        except EngineStartError as error:
            self._take_death(error.death)
            return
        self.on_restart()
        log.warning("the engine is ready again")

    def fail_all(self, reason: str) -> None:
        """End every request with an error; the engine stops working for them."""
        for stream in self._streams.values():
            if not stream.is_complete:
                self._end_in_engine(stream)
                stream.fail(EngineDeadError(reason))
