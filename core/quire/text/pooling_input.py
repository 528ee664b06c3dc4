"""From a text, token ids or a pair of texts to the tokens of which a vector is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import frozen

from quire.errors import RequestError
from quire.pooling_params import PoolingInput, PoolingParams
from quire.pooling_setup import CLASSIFY, PoolingSetup
from quire.text.json_files import shorten
from quire.text.tokenizer import Tokenizer

# A text is cut to so many times the characters that the longest tokens would fill, before the
# tokenizer cuts it to tokens: white space and words that it does not know take up more.
MOST_CHARS = 64


class ContextLengthError(RequestError):
    """Refuse a prompt that leaves no room for an answer (`context_length_exceeded`)."""


@frozen
class TextPair:
    """Two texts that are read together: a query and a document."""

    text: str
    second: str

    def __len__(self) -> int:
        return len(self.text) + len(self.second)


@frozen(kw_only=True)
class PoolingInputs:
    """What turns inputs into tokens for one checkpoint. `size`: numbers of a whole vector."""

    setup: PoolingSetup
    tokenizer: Tokenizer | None
    max_model_len: int
    size: int

    def tokens(
        self, prompt: Any, params: PoolingParams
    ) -> tuple[Sequence[int], PoolingInput, bool]:
        """Return token ids, what the engine has to know beside them, and whether they fit.

        `prompt` is a text, a pair or token ids. Raises: RequestError.
        """
        self._check_params(params)
        prefix = self._prefix(prompt, params)
        kept = self._kept(params)
        second_at, skipped = None, 0
        if isinstance(prompt, TextPair):
            ids, second_at = self._encode(prompt.text, prompt.second, kept)
        elif isinstance(prompt, str):
            ids, _ = self._encode(prefix + prompt, None, kept)
            if prefix and not self.setup.include_prompt:
                skipped = min(self._prompt_length(prefix), len(ids) - 1)
        else:
            ids = prompt if kept is None else prompt[:kept]
        asked = PoolingInput(
            second_at=second_at, num_skipped=skipped, is_whole=self.setup.needs_whole
        )
        return ids, asked, len(ids) <= self.max_model_len

    def _check_params(self, params: PoolingParams) -> None:
        scores = self.setup.task == CLASSIFY
        if params.dimensions is not None and (scores or params.dimensions > self.size):
            allowed = "none: scores are not cut" if scores else f"1 to {self.size}"
            raise RequestError(
                f"dimensions is {shorten(params.dimensions)}; allowed: {allowed}.",
                parameter="dimensions",
            )
        if params.prompt is not None and params.prompt_name is not None:
            raise RequestError("give prompt or prompt_name, not both.", parameter="prompt_name")
        name = params.prompt_name
        if name is not None and name not in self.setup.prompts:
            names = ", ".join(map(repr, self.setup.prompts)) or "none"
            raise RequestError(
                f"prompt_name is {shorten(name)}; the checkpoint has: {names}.",
                parameter="prompt_name",
            )

    def _prefix(self, prompt: Any, params: PoolingParams) -> str:
        """Return the text that is put before a text."""
        own = params.prompt
        name = params.prompt_name
        if own is None and name is not None:
            own = self.setup.prompts[name]
        if own is None:
            default = self.setup.default_prompt
            return "" if default is None else self.setup.prompts[default]
        if not isinstance(prompt, str):
            raise RequestError(
                "a prompt goes before a text; leave it out with token ids, or with pairs.",
                parameter="prompt" if name is None else "prompt_name",
            )
        return own

    def _kept(self, params: PoolingParams) -> int | None:
        """Return how many tokens are kept, None for all."""
        wanted = params.truncate_prompt_tokens
        if wanted is None or wanted == -1:
            return None if wanted is None else self.max_model_len
        if wanted > self.max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens is {shorten(wanted)}; allowed: up to the model's "
                f"{self.max_model_len} tokens, or -1.",
                parameter="truncate_prompt_tokens",
            )
        return wanted

    def _encode(
        self, text: str, second: str | None, kept: int | None
    ) -> tuple[list[int], int | None]:
        if self.tokenizer is None:
            raise RequestError(
                "input is text, but there is no tokenizer; give token ids.", parameter="input"
            )
        if self.setup.lower_case:
            text, second = text.lower(), None if second is None else second.lower()
        max_chars = self.max_model_len * self.tokenizer.longest_token_chars
        if kept is not None:
            longest = MOST_CHARS * max_chars
            text, second = text[:longest], None if second is None else second[:longest]
        elif len(text) + len(second or "") > max_chars:
            raise self.too_long(f"{len(text) + len(second or '')} characters")
        return self.tokenizer.encode_texts(text, second, kept)

    def too_long(self, size: str) -> ContextLengthError:
        """Return the error for an input of a size that does not fit."""
        return ContextLengthError(
            f"input has {size}, but the model takes {self.max_model_len} tokens; shorten it, or "
            "set truncate_prompt_tokens to -1.",
            parameter="input",
        )

    def _prompt_length(self, prefix: str) -> int:
        """Return how many tokens a prompt has alone, but for a special one at its end."""
        assert self.tokenizer is not None, "a text was encoded before"
        ids, _ = self._encode(prefix, None, None)
        ends = bool(ids) and ids[-1] in self.tokenizer.special_token_ids
        return len(ids) - ends


def check_scores(setup: PoolingSetup) -> None:
    """Refuse a classifier of several classes: none of its scores is for a pair."""
    if setup.task == CLASSIFY and len(setup.labels) != 1:
        raise RequestError(
            f"this model gives {len(setup.labels)} scores, one a class; pairs need a model with "
            "one. Use classify.",
            parameter="model",
        )


def pair_up(first: Any, second: Any) -> list[tuple[str, str]]:
    """Return the pairs: one text with each of the others, or as many with as many.

    Raises: RequestError.
    """
    ones, others = _texts(first, "text_1"), _texts(second, "text_2")
    if len(ones) == 1:
        ones = ones * len(others)
    if len(ones) != len(others):
        raise RequestError(
            f"text_1 has {len(ones)} texts and text_2 {len(others)}; give one with several, or as "
            "many of each.",
            parameter="text_1",
        )
    return list(zip(ones, others, strict=True))


def _texts(given: Any, name: str) -> list[str]:
    is_list = isinstance(given, (list, tuple))
    texts = list(given) if is_list else [given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{name} is not a text, or a list of texts.", parameter=name)
    return texts
