"""The grammars of the requests that an engine has, compiled before they are queued."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from attrs import Factory, define

from quire.constraints import GrammarSource
from quire.errors import CONTRADICTION, RequestError
from quire.hooks.registry import Registry
from quire.interfaces.grammar import CompiledGrammar
from quire.request import Request, SamplingParams
from quire.request_checks import NO_TOKEN_LEFT, tokens_left
from quire.structured.compiler import GrammarCompiler, GrammarSetup

MOST_THREADS = 8


def num_threads() -> int:
    """Return how many threads compile: both of two processors, of more every other."""
    count = len(os.sched_getaffinity(0))
    return min(max(count // 2, min(count, 2)), MOST_THREADS)


@define(kw_only=True)
class EngineGrammars:
    """Compiles what requests ask for; nothing is loaded before the first of them.

    `backend` is the grammar engine's name, None where there is none. `folder` finds the
    tokenizer's. A door has compiled each grammar before, in a process that can be killed.
    """

    backend: str | None
    folder: Callable[[], Path]
    vocab_size: int
    registry: Registry
    _compiler: GrammarCompiler | None = None
    _threads: ThreadPoolExecutor | None = None
    _begun: dict[GrammarSource, Future[None]] = Factory(dict)
    _lock: threading.RLock = Factory(threading.RLock)

    def begin(self, request: Request) -> Future[None] | None:
        """Begin to compile a request's grammar in a thread; None where it has none to compile.

        What is wrong with it is `admit`'s to say.
        """
        asked = request.params.structured_outputs
        return None if asked is None else self.begin_source(asked.source, request.eos_token_ids)

    def begin_source(
        self, source: GrammarSource, eos_token_ids: frozenset[int]
    ) -> Future[None] | None:
        """Begin to compile a grammar that a request will ask for; safe for threads."""
        if self.backend is None or not eos_token_ids:
            return None
        with self._lock:
            compiler = self._compiler_for(eos_token_ids, self.backend)
            if compiler.knows(source):
                return None
            begun = self._begun.get(source)
            if begun is None:
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(num_threads(), "quire-grammars")
                begun = self._threads.submit(self._compile_quietly, compiler, source)
                self._begun[source] = begun
            return begun

    def _compile_quietly(self, compiler: GrammarCompiler, source: GrammarSource) -> None:
        with contextlib.suppress(Exception):  # `admit` meets it again
            compiler.compile(source)
        with self._lock:
            del self._begun[source]

    def admit(self, request: Request) -> None:
        """Compile a request's grammar. Raises: RequestError."""
        asked = request.params.structured_outputs
        if asked is None:
            return
        if self.backend is None or not request.eos_token_ids:
            raise asked.error("needs a grammar engine and a checkpoint with an end token")
        compiler = self._compiler_for(request.eos_token_ids, self.backend)
        try:
            grammar = compiler.compile(asked.source)
            is_left = not limits_tokens(request) or self._leaves_tokens(grammar, request)
        except RequestError:
            raise
        except Exception as error:
            raise asked.error(f"cannot be honoured: {str(error).rstrip('.')}") from error
        if not is_left:
            raise RequestError(f"{CONTRADICTION}{NO_TOKEN_LEFT}", parameter=asked.asked_as)

    def _compiler_for(self, eos_token_ids: frozenset[int], backend: str) -> GrammarCompiler:
        """Return the compiler, made with the end tokens of the first request that needs it."""
        with self._lock:
            if self._compiler is None:
                setup = GrammarSetup(
                    backend=backend,
                    folder=self.folder(),
                    vocab_size=self.vocab_size,
                    eos_token_ids=tuple(sorted(eos_token_ids)),
                )
                self._compiler = GrammarCompiler(setup, self.registry)
            return self._compiler

    def _leaves_tokens(self, grammar: CompiledGrammar, request: Request) -> bool:
        """Whether other parameters leave any first token of a form."""
        mask = np.zeros((self.vocab_size + 31) // 32, np.int32)
        grammar.start().fill_mask(mask)
        single = [word[0] for word in request.bad_words_token_ids if len(word) == 1]
        return tokens_left(mask, request.params, single)

    def compiled(self, params: SamplingParams) -> CompiledGrammar:
        """Return the compiled grammar of a request that was admitted."""
        assert self._compiler is not None, "a request was admitted"
        assert params.structured_outputs is not None, "it asks for a form"
        return self._compiler.compile(params.structured_outputs.source)


def limits_tokens(request: Request) -> bool:
    """Whether parameters beside its form forbid a request tokens."""
    params = request.params
    has_ids = params.allowed_token_ids is not None or bool(params.forbidden_token_ids)
    return has_ids or bool(request.bad_words_token_ids)
