"""What a load generator asks, and when: random lengths, or a trace of a real service."""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from quire.errors import ConfigError

HASHED_TOKENS = 512  # prompt tokens that one hash id of a Mooncake trace stands for


@frozen(kw_only=True)
class Ask:
    """One request: when it is sent, in seconds from the begin, its prompt, its answer's length."""

    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int


@frozen(kw_only=True)
class TraceEntry:
    """One request of a trace; `hash_ids` name blocks of HASHED_TOKENS tokens, or are empty."""

    at_s: float
    num_prompt_tokens: int
    max_tokens: int
    hash_ids: tuple[int, ...] = ()


@frozen(kw_only=True)
class TokenRange:
    """Ids that prompts are made of: `low` to `high` - 1, which every tokenizer should have."""

    low: int = 300
    high: int = 4000

    def draw(self, rng: random.Random, count: int) -> list[int]:
        """Return random ids."""
        return [rng.randrange(self.low, self.high) for _ in range(count)]


def random_asks(
    count: int,
    *,
    input_len: int,
    output_len: int,
    spread: float,
    shared_prefix_len: int,
    tokens: TokenRange,
    seed: int,
) -> list[Ask]:
    """Return requests whose lengths vary evenly by the share `spread` around the given ones."""
    rng = random.Random(seed)
    prefix = tokens.draw(rng, shared_prefix_len)

    def length(mean: int) -> int:
        return max(1, round(rng.uniform(1 - spread, 1 + spread) * mean))

    return [
        Ask(
            at_s=0.0,
            prompt=(*prefix, *tokens.draw(rng, length(input_len))),
            max_tokens=length(output_len),
        )
        for _ in range(count)
    ]


def read_trace(path: Path, count: int) -> list[TraceEntry]:
    """Read the first requests of a trace: Mooncake's JSON lines, or Azure's CSV.

    Raises: ConfigError where the file cannot be read or is neither.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            read = _azure if path.suffix == ".csv" else _mooncake
            entries = list(itertools.islice(read(file), count))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is no trace: {type(error).__name__}: {error}. Allowed: JSON lines with "
            "timestamp (ms), input_length, output_length and hash_ids, or a .csv with TIMESTAMP, "
            "ContextTokens and GeneratedTokens."
        ) from error
    if not entries:
        raise ConfigError(f"{path} has no request.")
    first_s = entries[0].at_s
    return [evolve(entry, at_s=entry.at_s - first_s) for entry in entries]


def _mooncake(lines: Iterable[str]) -> Iterator[TraceEntry]:
    for line in lines:
        row = json.loads(line)
        yield TraceEntry(
            at_s=row["timestamp"] / 1000,
            num_prompt_tokens=int(row["input_length"]),
            max_tokens=int(row["output_length"]),
            hash_ids=tuple(row.get("hash_ids", ())),
        )


def _azure(lines: Iterable[str]) -> Iterator[TraceEntry]:
    for row in csv.DictReader(lines):
        # Seven digits of a second's fraction: one more than Python reads.
        yield TraceEntry(
            at_s=datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
            num_prompt_tokens=int(row["ContextTokens"]),
            max_tokens=int(row["GeneratedTokens"]),
        )


def trace_asks(
    entries: Sequence[TraceEntry],
    *,
    length_scale: float,
    speed: float,
    max_len: int | None,
    tokens: TokenRange,
    seed: int,
) -> list[Ask]:
    """Return the requests of a trace; equal hash ids become equal tokens.

    Lengths are multiplied by `length_scale` and cut to fit `max_len` tokens, times divided by
    `speed`.
    """
    block_len = max(1, round(HASHED_TOKENS * length_scale))
    rng = random.Random(seed)
    asks = []
    for entry in entries:
        prompt_len = max(1, round(entry.num_prompt_tokens * length_scale))
        max_tokens = max(1, round(entry.max_tokens * length_scale))
        if max_len is not None:
            max_tokens = min(max_tokens, max_len - 1)
            prompt_len = min(prompt_len, max_len - max_tokens)
        prompt: list[int] = []
        for hash_id in entry.hash_ids:
            prompt += tokens.draw(random.Random(f"{seed} {hash_id}"), block_len)
        prompt = prompt[:prompt_len]
        prompt += tokens.draw(rng, prompt_len - len(prompt))
        asks.append(Ask(at_s=entry.at_s / speed, prompt=tuple(prompt), max_tokens=max_tokens))
    return asks


def with_arrivals(asks: Sequence[Ask], rate: float, burstiness: float, seed: int) -> list[Ask]:
    """Return the requests at random times, `rate` a second.

    The times between them follow a gamma distribution whose shape is `burstiness`: 1 is a Poisson
    process, less comes in bursts, more is even.
    """
    rng = random.Random(seed)
    at_s, found = 0.0, []
    for ask in asks:
        found.append(evolve(ask, at_s=at_s))
        at_s += rng.gammavariate(burstiness, 1 / (rate * burstiness))
    return found


Writer = Callable[[Ask], dict[str, Any]]


def completion_body(model: str, extra: dict[str, Any]) -> Writer:
    """Return what makes the body of `/v1/completions`: the prompt as token ids."""

    def write(ask: Ask) -> dict[str, Any]:
        return {"model": model, "prompt": list(ask.prompt), **_common(ask), **extra}

    return write


def chat_body(model: str, extra: dict[str, Any]) -> Writer:
    """Return what makes the body of `/v1/chat/completions`: about a word for each token."""

    def write(ask: Ask) -> dict[str, Any]:
        text = " ".join(WORDS[token_id % len(WORDS)] for token_id in ask.prompt)
        messages = [{"role": "user", "content": text}]
        return {"model": model, "messages": messages, **_common(ask), **extra}

    return write


def _common(ask: Ask) -> dict[str, Any]:
    return {
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world"),
    *("school", "state", "family", "student", "group", "country", "problem", "hand", "part"),
    *("place", "case", "week", "company", "system", "program", "question", "work", "night"),
)
