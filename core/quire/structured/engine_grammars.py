"""The grammars of the requests that an engine has, compiled before they are queued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attrs import define

from quire.errors import RequestError
from quire.hooks.registry import Registry
from quire.interfaces.grammar import CompiledGrammar
from quire.request import Request, SamplingParams
from quire.structured.compiler import GrammarCompiler, GrammarSetup


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

    def admit(self, request: Request) -> None:
        """Compile a request's grammar. Raises: RequestError."""
        asked = request.params.structured_outputs
        if asked is None:
            return
        if self._compiler is None:
            if self.backend is None or not request.eos_token_ids:
                raise asked.error("needs a grammar engine and a checkpoint with an end token")
            setup = GrammarSetup(
                backend=self.backend,
                folder=self.folder(),
                vocab_size=self.vocab_size,
                eos_token_ids=tuple(sorted(request.eos_token_ids)),
            )
            self._compiler = GrammarCompiler(setup, self.registry)
        try:
            self.compiled(request.params)
        except RequestError:
            raise
        except Exception as error:
            raise asked.error(f"cannot be honoured: {str(error).rstrip('.')}") from error

    def compiled(self, params: SamplingParams) -> CompiledGrammar:
        """Return the compiled grammar of a request that was admitted."""
        assert self._compiler is not None, "a request was admitted"
        assert params.structured_outputs is not None, "it asks for a form"
        return self._compiler.compile(params.structured_outputs.source)
