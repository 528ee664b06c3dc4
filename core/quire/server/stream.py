"""One request on the server's side: what the engine gave, for whoever reads it, when they read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from quire.errors import QuireError
from quire.request import Logprob, Request, RequestOutput
from quire.text.output_processor import Delta, OutputProcessor


class News:
    """One reader's bell: `ring` wakes it, or lets its next `wait` return at once."""

    __slots__ = ("_future", "_rung")

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None
        self._rung = False

    def ring(self) -> None:
        """Wake the reader."""
        self._rung = True
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        """Wait for a ring since the last return."""
        if not self._rung:
            self._future = asyncio.get_running_loop().create_future()
            try:
                await self._future
            finally:
                self._future = None
        self._rung = False


class Stream:
    """A request's answers as they come.

    A reader that is slow gets several tokens at once: nothing is queued but text.
    Times are `time.monotonic()`'s.
    """

    def __init__(
        self,
        request: Request,
        outputs: OutputProcessor,
        *,
        on_close: Callable[[Stream], None],
        news: News | None = None,
    ) -> None:
        """Begin; `news` is the bell of a reader that waits for several streams at once."""
        self.request = request
        self.request_id = request.request_id
        self.arrival_s = request.arrival_s
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s = 0.0
        self.is_queued = True  # until the first token
        self.is_complete = False  # the engine has nothing more for it
        self._outputs = outputs
        self._on_close = on_close
        self._unfinished = list(range(request.params.n))
        self._error: QuireError | None = None
        self.news = news or News()
        self._closed = False

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that the prefix cache had."""
        return self._outputs.num_cached_tokens(self.request_id)

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """The prompt's log-probabilities, once they are there."""
        return self._outputs.prompt_logprobs(self.request_id)

    @property
    def pooled(self) -> bytes | None:
        """The vector or scores that were asked for, once they are there."""
        return self._outputs.pooled(self.request_id)

    @property
    def is_finished(self) -> bool:
        """Whether every sequence's end was taken."""
        return not self._unfinished

    @property
    def has_output(self) -> bool:
        """Whether there is something to show: the best sequences are known at the end of all."""
        return self.is_finished or self.request.num_best is None

    def notify(self, now_s: float) -> None:
        """Tell the reader that tokens came."""
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.news.ring()

    def fail(self, error: QuireError) -> None:
        """End with an error; what was not taken yet is lost."""
        self._error = error
        self.news.ring()

    async def next(self) -> list[Delta]:
        """Wait for news and return them, by index; nothing at the end, or if the bell lied.

        Raises: RequestError where the engine refuses the request, EngineDeadError.
        """
        deltas = self.take()
        if not deltas and self._unfinished:
            await self.news.wait()
            deltas = self.take()
        return deltas

    def take(self) -> list[Delta]:
        """Return what is new now. Raises: as `next`."""
        if self._error is not None:
            raise self._error
        deltas = []
        for index in tuple(self._unfinished):
            delta = self._outputs.take_delta(self.request_id, index)
            if delta.finish_reason is not None:
                self._unfinished.remove(index)
            if delta.text or delta.token_ids or delta.finish_reason is not None:
                deltas.append(delta)
        return deltas

    async def finish(self) -> RequestOutput:
        """Wait for the end and return everything. Raises: as `next`."""
        while self._unfinished:
            await self.next()
        return self.output()

    def output(self) -> RequestOutput:
        """Return all that there is so far."""
        return self._outputs.output(self.request_id)

    def close(self) -> None:
        """Forget the request, ending it where it still runs. May be called again."""
        if not self._closed:
            self._closed = True
            self._on_close(self)

    def standing(self) -> str:
        """Say in a few words where the request stands, for a log."""
        age = time.monotonic() - self.arrival_s
        state = "queued" if self.first_token_s is None else "generating"
        return f"{self.request_id}: {state}, {self.num_prompt_tokens} prompt tokens, {age:.1f} s"
