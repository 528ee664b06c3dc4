"""What one HTTP request set off: a stream for each of its prompts, read together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import define, frozen

from quire.errors import OverloadedError, RequestError
from quire.request import SamplingParams
from quire.server.async_engine import AsyncEngine
from quire.server.errors import SequenceFailed
from quire.server.stream import News, Stream
from quire.text.output_processor import Delta


@frozen(kw_only=True)
class Asked:
    """What a route asks of the engine."""

    prompts: Sequence[Any]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    generates: bool = True  # False: the token that the engine makes is not told of


@define
class Usage:
    """Tokens counted as OpenAI does: a prompt once, whatever `n` is."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generation:
    """The streams of one HTTP request. Choice `i` is prompt `i // n`, sequence `i % n`.

    Of `num_sequences` a prompt with `best_of`, which never is a stream, `n` become choices.
    """

    def __init__(self, streams: Sequence[Stream], news: News, asked: Asked) -> None:
        self.streams = streams
        self.news = news
        self.n = asked.params.n
        self._generates = asked.generates
        self._width = asked.params.num_sequences
        self._num_tokens = [0] * (len(streams) * self._width)  # by sequence
        self.usage = Usage(prompt_tokens=sum(s.num_prompt_tokens for s in streams))
        self.finish_reasons: list[str] = []

    @classmethod
    async def begin(cls, engine: AsyncEngine, asked: Asked) -> Generation:
        """Queue all prompts, or none. Raises: RequestError, OverloadedError."""
        news = News()
        streams: list[Stream] = []
        try:
            for prompt in asked.prompts:
                if streams:
                    await asyncio.sleep(0)  # many short ones together take long
                stream = await engine.submit(
                    prompt,
                    asked.params,
                    priority=asked.priority,
                    cache_salt=asked.cache_salt,
                    news=news,
                )
                streams.append(stream)
        except BaseException as error:
            is_alone = 0 < len(streams) == engine.admission.num_requests
            for stream in streams:
                stream.close()
            if is_alone and isinstance(error, OverloadedError) and error.code == "queue_full":
                raise _too_many(asked) from error
            raise
        return cls(streams, news, asked)

    @property
    def is_finished(self) -> bool:
        """Whether the end of every choice was taken."""
        return all(stream.is_finished for stream in self.streams)

    async def wait(self) -> list[tuple[int, Delta]]:
        """Wait for news of any choice and return them; nothing if the bell was rung for none.

        Raises: RequestError, EngineDeadError; SequenceFailed for a choice that failed.
        """
        found = list(self._take())
        if not found and not self.is_finished:
            await self.news.wait()
            found = list(self._take())
        return found

    async def finish(self) -> None:
        """Wait for the end of every choice. Raises: as `wait`."""
        while not self.is_finished:
            await self.wait()

    def close(self) -> None:
        """Forget the streams, ending what still runs."""
        for stream in self.streams:
            stream.close()

    def first_token_s(self) -> float | None:
        """Return when the first token came."""
        times = [s.first_token_s for s in self.streams if s.first_token_s is not None]
        return min(times, default=None)

    def scheduled_s(self) -> float | None:
        """Return when the first prompt left the queue."""
        times = [s.scheduled_s for s in self.streams if s.scheduled_s is not None]
        return min(times, default=None)

    def seconds_per_token(self) -> float | None:
        """Return the time from token to token in one choice; None where none has two."""
        found = []
        for number, stream in enumerate(self.streams):
            longest = max(self._num_tokens[number * self._width : (number + 1) * self._width])
            if longest > 1 and stream.first_token_s is not None:
                found.append((stream.last_token_s - stream.first_token_s) / (longest - 1))
        return sum(found) / len(found) if found else None

    def _take(self) -> Iterator[tuple[int, Delta]]:
        for number, stream in enumerate(self.streams):
            for delta in stream.take():
                index = number * self._width + delta.index
                self._count(index, delta)
                yield index, delta

    def _count(self, index: int, delta: Delta) -> None:
        if self._generates:
            self._num_tokens[index] += len(delta.token_ids)
            self.usage.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self.usage.cached_tokens = sum(s.num_cached_tokens for s in self.streams)
            self.finish_reasons.append(delta.finish_reason)
            if delta.finish_reason not in ("stop", "length"):
                raise SequenceFailed(delta.error or "the request was ended by the server")


def _too_many(asked: Asked) -> RequestError:
    """Refuse for good what does not even fit into an empty queue."""
    return RequestError(
        f"prompt has {len(asked.prompts)} entries, together more than the queue holds; ask for "
        "fewer at once, or raise --max-queued-requests or --max-queued-tokens.",
        parameter="prompt",
    )
