"""Compiled grammars of one process, kept by content."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

from attrs import frozen

from quire.constraints import GrammarKind, GrammarSource
from quire.hooks.grammars import load_grammar_engine
from quire.hooks.registry import Registry
from quire.interfaces.grammar import CompiledGrammar, GrammarEngine
from quire.structured.lark import check_lark
from quire.structured.schema import check_schema
from quire.structured.vocabulary import read_vocabulary

MAX_KEPT = 256
MAX_KEPT_CHARS = 2**23


@frozen(kw_only=True)
class GrammarSetup:
    """What a compiler is made of: the engine's name, the tokenizer's folder and its end tokens."""

    backend: str
    folder: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class GrammarCompiler:
    """Compile each grammar once; the engine and its vocabulary are loaded for the first."""

    def __init__(self, setup: GrammarSetup, registry: Registry) -> None:
        self._setup = setup
        self._registry = registry
        self._engine: GrammarEngine | None = None
        self._kept: OrderedDict[GrammarSource, CompiledGrammar] = OrderedDict()
        self._kept_chars = 0

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Return the compiled grammar. Raises: ValueError saying what cannot be honoured."""
        found = self._kept.get(source)
        if found is not None:
            self._kept.move_to_end(source)
            return found
        if source.kind is GrammarKind.JSON_SCHEMA:
            check_schema(json.loads(source.text))
        elif source.kind is GrammarKind.LARK:
            check_lark(source.text)
        found = self._kept[source] = self.engine().compile(source)
        self._kept_chars += len(source.text)
        while len(self._kept) > MAX_KEPT or self._kept_chars > MAX_KEPT_CHARS:
            oldest, _ = self._kept.popitem(last=False)
            self._kept_chars -= len(oldest.text)
        return found

    def engine(self) -> GrammarEngine:
        """Return the engine, loaded. Raises: PluginError, ConfigError."""
        if self._engine is None:
            setup = self._setup
            vocabulary = read_vocabulary(
                setup.folder, vocab_size=setup.vocab_size, eos_token_ids=setup.eos_token_ids
            )
            kind = load_grammar_engine(self._registry, setup.backend)
            self._engine = kind(vocabulary)
        return self._engine
