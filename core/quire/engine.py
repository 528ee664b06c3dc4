"""The engine: token ids in, token ids out, one step at a time. It never sees text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from attrs import Factory, define

from quire.config import EngineConfig
from quire.errors import EngineDeadError, RequestError
from quire.execution.in_flight import Forwarded, InFlight
from quire.preparation import Prepared
from quire.request import FinishReason, Request, SamplingParams, SequenceUpdate
from quire.scheduling.block_manager import BlockManager
from quire.scheduling.output import SchedulerOutput, StepResult
from quire.scheduling.scheduler import Scheduler
from quire.start import Starter
from quire.structured.engine_grammars import EngineGrammars


@define
class StepTiming:
    """The last call: how long it took, how much of it the host worked, and what it collected.

    `started` are the requests that computed for the first time in steps that it dispatched.
    """

    step_s: float = 0.0
    host_s: float = 0.0
    num_tokens: int = 0
    num_seqs: int = 0
    started: list[str] = Factory(list)

    def note_dispatched(self, output: SchedulerOutput) -> None:
        """Take down what a step begins with."""
        self.started += [added.request_id for added in output.added if added.index == 0]

    def note_collected(self, output: SchedulerOutput | None) -> None:
        """Take down what a step computed; None for a call that collects none."""
        self.num_tokens = 0 if output is None else output.num_tokens
        self.num_seqs = 0 if output is None else len(output.num_scheduled_tokens)


class Engine:
    """Schedule, dispatch and collect steps; `add_request` and `step` are all that a door needs.

    Not safe for threads: one thread owns an engine.
    """

    def __init__(self, prepared: Prepared, clock: Callable[[], float] = time.monotonic) -> None:
        """Load the model. Raises: ConfigError, CheckpointError or PluginError."""
        self.prepared = prepared
        self.clock = clock
        starter = Starter(prepared)
        self._processors = starter.processors
        self.runner, self.layout = starter.start()
        self._grammars = EngineGrammars(
            backend=None if prepared.grammar is None else prepared.grammar.name,
            folder=prepared.tokenizer_folder,
            vocab_size=prepared.model_config.vocab_size,
            registry=prepared.registry,
        )
        # Begins to compile a form that was checked and will be asked for; safe for threads.
        self.begin_grammar = self._grammars.begin_source
        self.runner.grammars.compile = self._grammars.compiled
        self.max_model_len = self.layout.kv_size.max_model_len
        self.selections = [*prepared.selections, *self.layout.selections]
        options = prepared.config.scheduler
        assert options.max_num_batched_tokens is not None, "the start knows how many pay"
        self.block_manager = BlockManager(
            self.layout.cache_groups(),
            enable_prefix_caching=prepared.config.cache.enable_prefix_caching,
            max_step_tokens=options.max_num_batched_tokens,
        )
        self.scheduler = Scheduler(options, self.block_manager, self.max_model_len, clock)
        self._depth = self.layout.limits.max_steps_in_flight
        self._in_flight: deque[tuple[SchedulerOutput, InFlight]] = deque()
        # Launched but for its end, which waits for masks; what was before it is collected.
        self._late: tuple[SchedulerOutput, Forwarded] | None = None
        self._failure: Exception | None = None
        self._last_step = 0  # that was dispatched or collected
        self.timing = StepTiming()

    @property
    def config(self) -> EngineConfig:
        """The configuration with what the model decided."""
        return self.prepared.config

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises: RequestError where it can never be served."""
        self._check_alive()
        assert (request.pooling is None) == (self.prepared.pooling is None), request.request_id
        self._check_extra_args(request.params)
        self._grammars.admit(request)
        self.scheduler.add_request(request)

    def begin_form(self, request: Request) -> Future[None] | None:
        """Begin to compile a request's form in a thread, so that `add_request` takes no time.

        None where there is nothing to compile.
        """
        return self._grammars.begin(request)

    def abort(self, request_id: str) -> None:
        """End a request; no update follows. An unknown id is no error."""
        self.scheduler.abort(request_id)

    def finish_sequence(self, request_id: str, index: int, reason: FinishReason) -> None:
        """End one sequence for a reason found outside, such as a stop string."""
        self.scheduler.finish_sequence(request_id, index, reason)

    def has_unfinished(self) -> bool:
        """Whether there is work, steps in flight included."""
        is_underway = bool(self._in_flight) or self._late is not None
        return is_underway or self.scheduler.has_unfinished()

    def step(self) -> list[SequenceUpdate]:
        """Keep the device busy and return what the oldest step in flight gave.

        Raises: EngineDeadError if the step failed as a whole; the engine cannot be used again.
        """
        self._check_alive()
        begin = time.perf_counter()
        self.timing.started.clear()
        waited, updates = 0.0, []
        try:
            self._launch()
            if not self._in_flight:
                self.timing.note_collected(None)
                return []
            results = []
            # What ends late needs the tokens of all before it.
            for _ in range(1 if self._late is None else len(self._in_flight)):
                output, in_flight = self._in_flight.popleft()
                self.timing.note_collected(output)
                self._last_step = output.step_id
                before = time.perf_counter()
                results.append(self.collect(in_flight))
                waited += time.perf_counter() - before
            if self._late is not None:
                self.runner.begin_masks(self._late[1])
            for result in results:
                updates += self.scheduler.update(result)
            self.timing.step_s = time.perf_counter() - begin
            self.timing.host_s = self.timing.step_s - waited
            return updates
        except Exception as error:
            self._failure = error
            raise EngineDeadError(
                f"the engine stopped in step {self._last_step}, with attention by "
                f"{self._attention()}: {type(error).__name__}: {error}"
            ) from error

    def _launch(self) -> None:
        """Launch steps until enough are in flight, or one ends late.

        That one's forms go on by tokens in flight: masks are begun when those are collected, and
        filled while the scheduler, and whoever takes the updates, go on.
        """
        while len(self._in_flight) + (self._late is not None) < self._depth:
            output = self.schedule()
            self._end_late()
            if output is None:
                return
            self._last_step = output.step_id
            self.timing.note_dispatched(output)
            if self._in_flight and self.runner.grammars.limit(output.samples):
                self._late = output, self.runner.forward(output)
                return
            self._in_flight.append((output, self.dispatch(output)))

    def _end_late(self) -> None:
        """Launch the end of the step that waits for its masks."""
        if self._late is not None:
            output, forwarded = self._late
            self._last_step = output.step_id
            self._in_flight.append((output, self.runner.sample(forwarded)))
            self._late = None

    def _attention(self) -> str:
        return ", ".join(s.used for s in self.layout.selections if s.kind == "attention")

    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step; None if nothing can be computed now."""
        return self.scheduler.schedule()

    def dispatch(self, output: SchedulerOutput) -> InFlight:
        """Launch a step."""
        return self.runner.dispatch(output)

    def collect(self, step: InFlight) -> StepResult:
        """Wait for a step's tokens."""
        return self.runner.collect(step)

    def _check_extra_args(self, params: SamplingParams) -> None:
        """Refuse arguments of logits processors that are not loaded, or that refuse them."""
        if params.beam_search is not None and self._processors:
            raise RequestError(
                f"beam search does not go through logits processors, and these are loaded: "
                f"{', '.join(self._processors)}; start without --logits-processors.",
                parameter="beam_search",
            )
        for name, arguments in params.extra_args.items():
            if name not in self._processors:
                loaded = ", ".join(self._processors) or "none"
                raise RequestError(
                    f"extra_args has {name!r}, which is no loaded logits processor (loaded: "
                    f"{loaded}); --logits-processors loads one.",
                    parameter="extra_args",
                )
            try:
                self._processors[name].check_arguments(arguments, params)
            except RequestError:
                raise
            except Exception as error:
                raise RequestError(
                    f"extra_args[{name!r}] cannot be checked: {type(error).__name__}: {error}.",
                    parameter="extra_args",
                ) from error

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(
                f"the engine stopped earlier: {self._failure}; make a new one."
            ) from self._failure
