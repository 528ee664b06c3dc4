"""The offline door: `LLM.generate` and `LLM.chat`, with the names and arguments of vLLM's."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from typing import Any

from quire.beam_search import BeamSearchOutput, BeamSearchParams
from quire.config import EngineConfig
from quire.engine import Engine
from quire.errors import RequestError
from quire.frontend import Frontend
from quire.llm_pooling import PoolingDoor
from quire.pooling_params import PoolingParams
from quire.request import FinishReason, Request, RequestOutput, SamplingParams
from quire.text.beam_outputs import to_beam_output
from quire.text.input_processor import RenderedChat, prompt_text
from quire.text.output_processor import Delta, OutputProcessor, Processed
from quire.text.tokenizer import Tokenizer
from quire.vllm_keywords import without_neutral

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM(PoolingDoor):
    """A model, ready to generate.

    `LLM(model, **options)` takes every option of `quire generate --help`, with underscores:
    `LLM("demo", max_num_seqs=8)`. Not safe for threads.
    Source: the names and arguments are those of vLLM's offline API.
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Check, then load. Raises: ConfigError, CheckpointError or PluginError."""
        given = {"model": str(model), **without_neutral(options)}
        self._start(Frontend(EngineConfig.from_options(given)))

    @classmethod
    def from_frontend(cls, frontend: Frontend) -> LLM:
        """Load a model whose files were checked."""
        llm = cls.__new__(cls)
        llm._start(frontend)
        return llm

    def _start(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.engine = Engine(frontend.prepared)
        frontend.serve(self.engine.max_model_len)
        self._outputs = OutputProcessor(frontend.tokenizer)
        self._numbers = itertools.count()
        for warning in frontend.warnings:
            warnings.warn(warning, stacklevel=3)

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises: ConfigError where the checkpoint has none."""
        return self.frontend.require_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """Return what generation_config.json recommends."""
        return self.frontend.sampling_params()

    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or several, in the order given.

        A prompt is a text, a list of token ids, `{"prompt": ...}` or
        `{"prompt_token_ids": [...]}`. One SamplingParams serves all prompts, or each has its own.
        Raises: RequestError before anything runs if one of the prompts cannot be served;
        EngineDeadError if the engine stopped.
        """
        if lora_request is not None:
            raise RequestError(
                "lora_request is not supported by this version of Quire; leave it out.",
                parameter="lora_request",
            )
        items = _as_list(prompts)
        params = self._params_of(sampling_params, len(items))
        priorities = list(priority) if priority is not None else [0] * len(items)
        if len(priorities) != len(items):
            raise RequestError(
                f"{len(priorities)} priorities for {len(items)} prompts; give one each.",
                parameter="priority",
            )
        self.frontend.check_forms(params, self.engine.begin_grammar)
        requests = []
        for prompt, own, rank in zip(items, params, priorities, strict=True):
            requests.append((self._request(prompt, own, rank), prompt_text(prompt)))
        return self._run(requests, use_tqdm)

    def beam_search(
        self,
        prompts: Any,
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Search the most likely continuations of one prompt or several, all at once.

        At most `concurrency_limit` prompts at a time, where it is given. What is found for a
        prompt whose row failed is empty, with a warning.
        Raises: RequestError before a search runs that cannot be served.
        """
        if not isinstance(params, BeamSearchParams):
            raise RequestError(
                f"params is a {type(params).__name__}; allowed: BeamSearchParams.",
                parameter="params",
            )
        if concurrency_limit is not None and concurrency_limit < 1:
            raise RequestError(
                f"concurrency_limit is {concurrency_limit}; allowed: None, or numbers from 1.",
                parameter="concurrency_limit",
            )
        items, values = _as_list(prompts), SamplingParams(**params.sampling_values())
        size = concurrency_limit or max(len(items), 1)
        found = [
            output
            for begin in range(0, len(items), size)
            for output in self.generate(
                items[begin : begin + size], values, use_tqdm, lora_request=lora_request
            )
        ]
        return [to_beam_output(output, params, self.frontend.tokenizer) for output in found]

    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; a conversation is a list of OpenAI's messages.

        `options` are vLLM's: chat_template (a text, instead of the checkpoint's own),
        add_generation_prompt, continue_final_message, tools, chat_template_kwargs.
        Raises: RequestError, ConfigError where the checkpoint has no chat template.
        """
        self.frontend.check_generates()
        options = _template_options(options)
        conversations = messages if _is_nested(messages) else [messages]
        rendered = [self.frontend.render(conversation, **options) for conversation in conversations]
        return self.generate(rendered, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """Yield what is new of one prompt's answers after every step.

        Raises: RequestError at the first `next`. Closing the iterator ends the request.
        """
        request = self._request(prompt, sampling_params or self.frontend.sampling_params(), 0)
        if request.num_best is not None:
            raise RequestError(
                f"best_of is {request.params.n}, above n: which sequences are the best is known at "
                "their end. Use generate, or leave it out.",
                parameter="best_of",
            )
        self._add([(request, prompt_text(prompt))])
        try:
            yield from self._deltas(request)
        finally:
            self._forget([request])

    def _deltas(self, request: Request) -> Iterator[Delta]:
        unfinished = set(range(request.params.n))
        while unfinished:
            # Also what the steps of another call on this engine gave.
            for index in sorted(unfinished):
                delta = self._outputs.take_delta(request.request_id, index)
                if delta.finish_reason is not None:
                    unfinished.remove(index)
                if delta.text or delta.token_ids or delta.finish_reason:
                    yield delta
            if unfinished:
                self._step()
        self._collect_the_rest()

    def run_pooling(
        self, prompts: Sequence[Any], params: Sequence[PoolingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        """Run all inputs and return their outputs in order. Raises: RequestError."""
        pairs = zip(prompts, params, strict=True)
        requests = [(self._request(prompt, own, 0), None) for prompt, own in pairs]
        return self._run(list(requests), use_tqdm)

    def _params_of(self, given: Params, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        params = list(given)
        if len(params) != count:
            raise RequestError(
                f"{len(params)} sampling_params for {count} prompts; give one for all or one each.",
                parameter="sampling_params",
            )
        return params

    def _request(
        self, prompt: Any, params: SamplingParams | PoolingParams, priority: int
    ) -> Request:
        return self.frontend.inputs.process(
            prompt,
            params,
            request_id=str(next(self._numbers)),
            arrival_s=self.engine.clock(),
            priority=priority,
        )

    def _add(self, requests: Sequence[tuple[Request, str | None]]) -> None:
        """Queue all requests, or none if one is refused."""
        added: list[Request] = []
        # All are compiled side by side.
        wait([form for request, _ in requests if (form := self.engine.begin_form(request))])
        try:
            for request, text in requests:
                self.engine.add_request(request)
                self._outputs.add_request(request, text)
                added.append(request)
        except Exception:
            self._forget(added)
            raise

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.abort(request.request_id)
            if request.request_id in self._outputs:
                self._outputs.remove(request.request_id)

    def _step(self) -> Processed:
        """Run one step of the engine, for all requests that are in it."""
        with interrupt_deferred():
            processed = self._outputs.process(self.engine.step())
            for request_id, index in processed.to_finish:
                self.engine.finish_sequence(request_id, index, FinishReason.STOP)
        return processed

    def _collect_the_rest(self) -> None:
        """Collect the steps in flight that nobody waits for, so that their blocks come back."""
        while self.engine.has_unfinished() and not self.engine.scheduler.has_unfinished():
            self._step()

    def _run(
        self, requests: list[tuple[Request, str | None]], use_tqdm: bool
    ) -> list[RequestOutput]:
        self._add(requests)
        progress = Progress(len(requests)) if use_tqdm and requests else None
        done: dict[str, RequestOutput] = {}
        try:
            for output in self._finished_outputs({r.request_id for r, _ in requests}):
                done[output.request_id] = output
                if progress is not None:
                    progress.add(output)
        finally:
            self._forget([r for r, _ in requests if r.request_id not in done])
            if progress is not None:
                progress.close()
        return [done[request.request_id] for request, _ in requests]

    def _finished_outputs(self, waiting: set[str]) -> Iterator[RequestOutput]:
        while waiting:
            for request_id in waiting.intersection(self._step().finished):
                waiting.remove(request_id)
                error = self._outputs.error(request_id)
                if error is not None:
                    warnings.warn(f"request {request_id} failed: {error}", stacklevel=5)
                yield self._outputs.remove(request_id)
        self._collect_the_rest()


@contextlib.contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Let Ctrl-C wait until the body is done: half a step would leave the engine unusable."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    received: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        previous(*received[0])


class Progress:
    """A bar of finished prompts, with tokens a second."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc="Processed prompts", unit="prompt", dynamic_ncols=True)
        self._begin = time.monotonic()
        self._num_in = self._num_out = 0

    def add(self, output: RequestOutput) -> None:
        """Count a finished request."""
        self._num_in += len(output.prompt_token_ids)
        self._num_out += sum(len(completion.token_ids) for completion in output.outputs)
        seconds = max(time.monotonic() - self._begin, 1e-9)
        self._bar.set_postfix_str(
            f"input: {self._num_in / seconds:.1f} tok/s, "
            f"output: {self._num_out / seconds:.1f} tok/s",
            refresh=False,
        )
        self._bar.update(1)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _as_list(prompts: Any) -> list[Any]:
    """Return a list of prompts; a list of token ids is one prompt."""
    if isinstance(prompts, (str, Mapping, RenderedChat)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        kind = type(prompts).__name__
        raise RequestError(
            f"prompts is a {kind}; allowed: a prompt or a list of prompts.", parameter="prompt"
        )
    is_ids = bool(prompts) and all(type(item) is int for item in prompts)
    return [list(prompts)] if is_ids else list(prompts)


def _template_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `Frontend.render` takes. Raises: RequestError for anything else."""
    names = {"chat_template_kwargs": "kwargs", "chat_template": "template"}
    names |= {name: name for name in ("add_generation_prompt", "continue_final_message", "tools")}
    neutral = {"chat_template_content_format": "auto", "lora_request": None}
    for name, value in given.items():
        if name not in names and (name not in neutral or value != neutral[name]):
            raise RequestError(
                f"chat() has no {name!r} with such a value; allowed: {', '.join(names)}.",
                parameter=name,
            )
    return {names[name]: value for name, value in given.items() if name in names}


def _is_nested(messages: Any) -> bool:
    return (
        isinstance(messages, (list, tuple))
        and all(isinstance(item, (list, tuple)) for item in messages)
        and bool(messages)
    )
