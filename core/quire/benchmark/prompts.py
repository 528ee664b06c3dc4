"""Random prompts for an engine in this process, and what is asked for each."""

from __future__ import annotations

import random
from collections.abc import Sequence

from attrs import frozen

from quire.errors import ConfigError


@frozen(kw_only=True)
class Lengths:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read LOW:HIGH, or one number for both. Raises: ValueError."""
        low, colon, high = text.partition(":")
        found = cls(low=int(low), high=int(high if colon else low))
        if not 1 <= found.low <= found.high:
            raise ValueError(text)
        return found

    def draw(self, rng: random.Random) -> int:
        """Return one of them, all equally likely."""
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@frozen(kw_only=True)
class Work:
    """One request: a prompt of token ids and the number of tokens to generate."""

    prompt: list[int]
    num_tokens: int


def draw_lengths(
    count: int, input_len: Lengths, output_len: Lengths, seed: int
) -> list[tuple[int, int]]:
    """Return (prompt tokens, tokens to generate) of each request."""
    rng = random.Random(seed)
    return [(input_len.draw(rng), output_len.draw(rng)) for _ in range(count)]


def draw_prompts(lengths: Sequence[tuple[int, int]], *, vocab_size: int, seed: str) -> list[Work]:
    """Return requests of these lengths, whose prompts are random ids of the whole vocabulary."""
    rng = random.Random(seed)
    return [
        Work(prompt=rng.choices(range(vocab_size), k=length), num_tokens=num_tokens)
        for length, num_tokens in lengths
    ]


def check_fits(lengths: Sequence[tuple[int, int]], max_model_len: int) -> None:
    """Raise ConfigError where a request is longer than the context."""
    longest = max(sum(pair) for pair in lengths)
    if longest > max_model_len:
        raise ConfigError(
            f"a request has {longest} tokens, prompt and answer together, but the context is "
            f"{max_model_len}; lower --input-len or --output-len, or raise --max-model-len."
        )
