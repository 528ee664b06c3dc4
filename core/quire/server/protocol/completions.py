"""The body of `POST /v1/completions`."""

from __future__ import annotations

from typing import Any, Literal

from quire.errors import RequestError
from quire.server.protocol import fields as f
from quire.server.protocol.generation import GenerationBody, conflict
from quire.text.input_processor import RenderedChat

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(
    GenerationBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A prompt, or several, to be completed."""

    prompt: f.Prompt
    n: f.Choices | None = None
    best_of: f.Choices | None = None
    max_tokens: f.CountOrZero | None = None
    echo: f.Flag | None = None
    logprobs: f.NumLogprobs | None = None
    add_special_tokens: f.Flag | None = None

    suffix: Literal[""] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """The log-probabilities asked for."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """An echoed prompt gets log-probabilities as the answer does."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in wanted if number is not None), default=None)

    @property
    def wants_no_generation(self) -> bool:
        """Whether the prompt alone is wanted back, with its log-probabilities."""
        return self.max_tokens == 0 and bool(self.echo)

    def length_limit(self) -> tuple[str, int | None]:
        """Return `max_tokens`; the engine makes a token even where none is wanted."""
        if self.max_tokens is None:
            return "max_tokens", DEFAULT_MAX_TOKENS
        return "max_tokens", max(self.max_tokens, 1)

    def check(self) -> None:
        """Refuse fields that do not fit together. Raises: RequestError."""
        super().check()
        self._check_prompt()
        if self.max_tokens == 0 and not self.echo:
            raise conflict("max_tokens", "is 0; allowed: whole numbers from 1, or 0 with echo")
        if self.max_tokens == 0 and self.min_tokens:
            raise conflict("min_tokens", "is above max_tokens; lower it")
        self.check_best_of(self.best_of, self.n)

    def prompts(self) -> list[Any]:
        """Return each prompt: a text, or a list of token ids."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or isinstance(given[0], int)
        prompts = [given] if is_one else list(given)
        if self.add_special_tokens is False:
            return [RenderedChat(p) if isinstance(p, str) else p for p in prompts]
        return prompts

    def _check_prompt(self) -> None:
        if isinstance(self.prompt, str):
            return
        kinds = set(map(type, self.prompt))
        if len(kinds) != 1:
            raise RequestError(
                "prompt mixes texts, token ids and lists; give entries of one kind.",
                parameter="prompt",
            )
        if kinds == {int}:
            return
        count = len(self.prompt)
        if count > f.MAX_PROMPTS:
            raise conflict("prompt", f"has {count} entries; allowed: up to {f.MAX_PROMPTS}")
        name, each = ("best_of", self.best_of) if self.best_of else ("n", self.n or 1)
        if count * each > f.MAX_CHOICES:
            raise conflict(name, f"asks for {count * each} answers; allowed: up to {f.MAX_CHOICES}")
