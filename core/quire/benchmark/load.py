"""Send requests to an OpenAI-compatible server as a plan says, and take down when tokens come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import Factory, define, frozen

from quire.benchmark.workload import Ask, Writer
from quire.errors import ConfigError

if TYPE_CHECKING:
    import aiohttp

MAX_ERROR_CHARS = 200


@define(kw_only=True)
class Result:
    """What came of one request. Times are seconds from the begin of the run."""

    sent_s: float
    chunk_s: list[float] = Factory(list)  # of the chunks with text, or of an end without any
    end_s: float = 0.0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def first_s(self) -> float:
        """Time to first token."""
        return self.chunk_s[0] - self.sent_s

    @property
    def per_token_s(self) -> float | None:
        """Time per output token after the first; None for a single one."""
        if self.num_tokens < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.num_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Times between chunks."""
        return [b - a for a, b in zip(self.chunk_s, self.chunk_s[1:], strict=False)]

    @property
    def whole_s(self) -> float:
        """End-to-end latency."""
        return self.end_s - self.sent_s


@frozen(kw_only=True)
class Target:
    """The server that is measured."""

    base_url: str
    path: str
    write: Writer
    api_key: str | None = None
    timeout_s: float = 600.0


def check_installed() -> None:
    """Raise ConfigError where the client is not installed."""
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "`quire bench serve` needs aiohttp; install it with `pip install 'quire[bench]'`."
        ) from error


def _session(target_timeout_s: float, api_key: str | None) -> aiohttp.ClientSession:
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=target_timeout_s),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
    )


async def served_models(base_url: str, api_key: str | None) -> list[dict[str, Any]]:
    """Return what `/v1/models` lists. Raises: ConfigError where nothing answers."""
    import aiohttp

    url = f"{base_url}/v1/models"
    try:
        async with _session(30.0, api_key) as session, session.get(url) as answer:
            if answer.status != 200:
                text = (await answer.text())[:MAX_ERROR_CHARS]
                raise ConfigError(f"{url} answers {answer.status}: {text}")
            found: list[dict[str, Any]] = (await answer.json())["data"]
            return found
    except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no OpenAI-compatible server answers at {url}: {error or type(error).__name__}."
        ) from error


async def run_open(target: Target, asks: Sequence[Ask], max_concurrency: int | None) -> Run:
    """Send each request at its time, whatever the server does; `max_concurrency` holds back."""
    limit = asyncio.Semaphore(max_concurrency or len(asks))
    async with _session(target.timeout_s, target.api_key) as session:
        client = _Client(session, target)

        async def one(ask: Ask) -> Result:
            await asyncio.sleep(ask.at_s - client.now_s())
            async with limit:
                return await client.ask(ask)

        return Run(results=await asyncio.gather(*map(one, asks)), took_s=client.now_s())


async def run_closed(target: Target, asks: Sequence[Ask], concurrency: int) -> Run:
    """Keep `concurrency` requests running until all are answered."""
    waiting = iter(asks)
    async with _session(target.timeout_s, target.api_key) as session:
        client = _Client(session, target)

        async def worker() -> list[Result]:
            return [await client.ask(ask) for ask in waiting]

        found = await asyncio.gather(*[worker() for _ in range(concurrency)])
        return Run(
            results=[result for results in found for result in results], took_s=client.now_s()
        )


@frozen(kw_only=True)
class Run:
    """All results, and how long it took to get them."""

    results: list[Result]
    took_s: float


class _Client:
    def __init__(self, session: aiohttp.ClientSession, target: Target) -> None:
        self._session = session
        self._target = target
        self._begin_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._begin_s

    async def ask(self, ask: Ask) -> Result:
        """Send one request and read its events; whatever fails is the result's error."""
        import aiohttp

        body = json.dumps(self._target.write(ask)).encode()
        result = Result(sent_s=self.now_s())
        url = self._target.base_url + self._target.path
        headers = {"content-type": "application/json"}
        try:
            async with self._session.post(url, data=body, headers=headers) as answer:
                if answer.status != 200:
                    text = (await answer.text())[:MAX_ERROR_CHARS]
                    result.error = f"{answer.status}: {text}"
                else:
                    await self._read(answer.content, result)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            result.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
        result.end_s = self.now_s()
        return result

    async def _read(self, content: aiohttp.StreamReader, result: Result) -> None:
        is_done = False
        async for line in content:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                is_done = True
            else:
                try:
                    self._take(json.loads(data), result)
                except (AttributeError, LookupError, TypeError) as error:
                    raise ValueError(f"an event has not OpenAI's form: {error!r}") from error
        if result.error is None and not (is_done and result.finish_reason):
            result.error = "the stream ended without finish_reason and [DONE]"
        result.num_tokens = result.num_tokens or len(result.chunk_s)

    def _take(self, chunk: dict[str, Any], result: Result) -> None:
        if "error" in chunk:
            result.error = str(chunk["error"])[:MAX_ERROR_CHARS]
            return
        for choice in chunk.get("choices", ()):
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            if text:
                result.chunk_s.append(self.now_s())
            result.finish_reason = choice.get("finish_reason") or result.finish_reason
            if result.finish_reason and not result.chunk_s:
                # A lone token may have no text: an end token, or half a character.
                result.chunk_s.append(self.now_s())
        usage = chunk.get("usage")
        if usage:
            result.num_prompt_tokens = usage["prompt_tokens"]
            result.num_tokens = usage["completion_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            result.num_cached_tokens = details.get("cached_tokens") or 0
