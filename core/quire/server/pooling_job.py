"""What one HTTP request for vectors or scores set off: its inputs, a window of them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from attrs import frozen

from quire.errors import OverloadedError, RequestError
from quire.pooling_params import PoolingParams
from quire.server.async_engine import AsyncEngine
from quire.server.errors import SequenceFailed
from quire.server.generation import Usage
from quire.server.stream import News, Stream
from quire.text.input_processor import ContextLengthError

# For one HTTP request there are so many steps' inputs in the engine: enough that none lacks any,
# and so few that another request is served soon.
STEPS = 2


@frozen(kw_only=True)
class PoolingAsked:
    """What a route asks of the engine."""

    inputs: Sequence[Any]
    params: PoolingParams
    priority: int = 0
    cache_salt: str | None = None


class PoolingJob:
    """The inputs of one HTTP request; replies and records read it as a `Generation`.

    `vectors` are the engine's numbers, by input. An input that fails ends the others.
    """

    def __init__(self, engine: AsyncEngine, asked: PoolingAsked, max_step_tokens: int) -> None:
        self.news = News()
        self.vectors: list[bytes | None] = [None] * len(asked.inputs)
        self.usage = Usage()
        self.finish_reasons: list[str] = []
        self._engine = engine
        self._asked = asked
        self._open: dict[int, Stream] = {}
        self._next = 0
        self._most_inputs = STEPS * engine.frontend.config.scheduler.max_num_seqs
        self._most_tokens = STEPS * max_step_tokens
        self._open_tokens = 0
        self._first_s: float | None = None
        self._scheduled_s: float | None = None

    @classmethod
    async def begin(
        cls, engine: AsyncEngine, asked: PoolingAsked, *, max_step_tokens: int
    ) -> PoolingJob:
        """Queue the first inputs. Raises: RequestError, OverloadedError."""
        job = cls(engine, asked, max_step_tokens)
        try:
            await job._submit()
        except BaseException:
            job.close()
            raise
        return job

    @property
    def is_finished(self) -> bool:
        """Whether every input has its vector."""
        return self._next == len(self.vectors) and not self._open

    @property
    def _is_full(self) -> bool:
        """Whether the engine has enough inputs of this request."""
        many = len(self._open) >= self._most_inputs or self._open_tokens >= self._most_tokens
        return bool(self._open) and many

    async def wait(self) -> None:
        """Wait for news of any input, and queue more. Raises: as `begin`; SequenceFailed."""
        if not self._take() and not self.is_finished:
            await self.news.wait()
            self._take()
        await self._submit()

    def close(self) -> None:
        """Forget the inputs, ending those that still run."""
        for stream in self._open.values():
            stream.close()
        self._open.clear()

    def first_token_s(self) -> float | None:
        """Return when the first vector came."""
        return self._first_s

    def scheduled_s(self) -> float | None:
        """Return when the first input left the queue."""
        return self._scheduled_s

    def seconds_per_token(self) -> None:
        """There are no tokens."""

    async def _submit(self) -> None:
        """Fill the window, as far as the queue has room for more."""
        while self._next < len(self.vectors) and not self._is_full:
            if self._open:
                await asyncio.sleep(0)  # many short ones together take long
            try:
                stream = await self._engine.submit(
                    self._asked.inputs[self._next],
                    self._asked.params,
                    priority=self._asked.priority,
                    cache_salt=self._asked.cache_salt,
                    news=self.news,
                )
            except OverloadedError as error:
                if error.code == "queue_full" and self._open:
                    return  # its own will end, and ring
                raise
            except RequestError as error:
                raise self._named(error) from error
            self._open[self._next] = stream
            self._next += 1
            self.usage.prompt_tokens += stream.num_prompt_tokens
            self._open_tokens += stream.num_prompt_tokens

    def _named(self, error: RequestError) -> RequestError:
        """Return the error with the input's number, where there are several."""
        if len(self.vectors) == 1 or error.parameter != "input":
            return error
        kind = ContextLengthError if isinstance(error, ContextLengthError) else RequestError
        return kind(f"number {self._next}: {error}", parameter="input")

    def _take(self) -> bool:
        """Take in what has ended; answer whether anything has."""
        ended = [number for number, stream in self._open.items() if self._has_ended(stream)]
        for number in ended:
            stream = self._open.pop(number)
            self.vectors[number] = stream.pooled
            self._open_tokens -= stream.num_prompt_tokens
            self.usage.cached_tokens += stream.num_cached_tokens
            self._first_s = self._first_s or stream.first_token_s
            self._scheduled_s = self._scheduled_s or stream.scheduled_s
            stream.close()
        return bool(ended)

    def _has_ended(self, stream: Stream) -> bool:
        for delta in stream.take():
            if delta.finish_reason is not None:
                self.finish_reasons.append(delta.finish_reason)
                if delta.finish_reason != "stop":
                    raise SequenceFailed(delta.error or "the request was ended by the server")
        return stream.is_finished
