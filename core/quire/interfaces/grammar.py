"""The contract of grammar engines, which say what tokens may come next. Never imports torch."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from quire.constraints import GrammarKind, GrammarSource, Node

__all__ = [
    "CompiledGrammar",
    "GrammarEngine",
    "GrammarKind",
    "GrammarMatcher",
    "GrammarSource",
    "GrammarStuck",
    "GrammarVocabulary",
    "Node",
]


class GrammarStuck(Exception):
    """A matcher that cannot go on, as where a limit is met; ends that sequence alone."""


@frozen(kw_only=True)
class GrammarVocabulary:
    """The tokens of a model.

    `tokens[i]` are the bytes that token i adds to a text, empty for ids that must never come.
    `special_token_ids` are no text. `eos_token_ids` end an answer. `vocab_size` is the model's,
    at least `len(tokens)`. `encode` gives the token ids of a text that others stand before: their
    bytes are the text's; it raises ValueError where no tokens can write it. `tokenizer_json` writes
    the tokenizer as a Hugging Face `tokenizer.json`, for libraries that read one; None where there
    is none, or grammars are only checked.
    """

    tokens: Sequence[bytes]
    special_token_ids: frozenset[int]
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    encode: Callable[[str], list[int]]
    tokenizer_json: Callable[[], str] | None = None


class GrammarMatcher(abc.ABC):
    """Where one sequence stands in its grammar."""

    @abc.abstractmethod
    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Write which tokens may come next: bit i % 32 of `mask[i // 32]` for token i.

        `mask` is [ceil(vocab_size / 32)] with any values before; bits behind the vocabulary are not
        set. End tokens may come where the grammar may end, and nowhere else; other special tokens
        where a structural tag spells one. Where one text has to come, a mask may leave out ways to
        cut it into tokens, though `accept` takes them.
        Raises: GrammarStuck.
        """

    @classmethod
    def fill_masks(
        cls, matchers: Sequence[GrammarMatcher], masks: NDArray[np.int32]
    ) -> list[Exception | None]:
        """Fill a row of `masks` [len(matchers), ceil(vocab_size / 32)] for each matcher of a step.

        All are of this class. Returns what each raised; an engine that can do it at once may.
        """
        found: list[Exception | None] = []
        for matcher, mask in zip(matchers, masks, strict=True):
            try:
                matcher.fill_mask(mask)
            except Exception as error:  # noqa: BLE001  it ends its own sequence
                found.append(error)
            else:
                found.append(None)
        return found

    @abc.abstractmethod
    def accept(self, token_id: int) -> None:
        """Go on by a token, an end token included. Raises: GrammarStuck for one that may not come.

        A token that may not come leaves the matcher unusable.
        """

    @classmethod
    def accept_each(
        cls, matchers: Sequence[GrammarMatcher], token_ids: Sequence[int]
    ) -> list[Exception | None]:
        """Let each matcher of a step go on by its token; return what each raised.

        All are of this class; an engine that can do it at once may.
        """
        found: list[Exception | None] = []
        for matcher, token_id in zip(matchers, token_ids, strict=True):
            try:
                matcher.accept(token_id)
            except Exception as error:  # noqa: BLE001  it ends its own sequence
                found.append(error)
            else:
                found.append(None)
        return found

    @abc.abstractmethod
    def is_terminated(self) -> bool:
        """Whether nothing but an end token may come, or one has."""


class CompiledGrammar(abc.ABC):
    """A grammar that sequences can start on; shared, never changed."""

    @abc.abstractmethod
    def start(self) -> GrammarMatcher:
        """Return a matcher at the beginning."""


class GrammarEngine(abc.ABC):
    """Compile grammars for one vocabulary.

    It is made twice: in a process that compiles a request's grammar first, and is killed where
    that takes too long, and in the engine's. Both must come to the same answer. With
    `compiles_in_threads` several threads may call `compile` at once.
    """

    compiles_in_threads: ClassVar[bool] = False

    @abc.abstractmethod
    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        """Prepare for a vocabulary."""

    @abc.abstractmethod
    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Compile a grammar.

        Raises: ValueError saying in a sentence what cannot be honoured, naming the keyword. What
        is not enforced exactly is refused, never ignored.
        """

    def compile_for_check(self, source: GrammarSource) -> CompiledGrammar:
        """Compile a grammar of which a few masks are filled, to see whether it can be honoured.

        It may leave out what only makes masks faster; what it refuses, `compile` is asked about.
        Raises: ValueError, at least where `compile` does.
        """
        return self.compile(source)
