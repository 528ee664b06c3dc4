"""Compiled grammars of one process, kept by content."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from attrs import frozen

from quire.constraints import GrammarKind, GrammarSource
from quire.hooks.grammars import load_grammar_engine
from quire.hooks.registry import Registry
from quire.interfaces.gbnf import never_ending, read_gbnf
from quire.interfaces.grammar import CompiledGrammar, GrammarEngine
from quire.structural_tags import nodes_of, schemas_of
from quire.structured.lark import check_lark
from quire.structured.schema import check_schema
from quire.structured.vocabulary import read_vocabulary

MAX_KEPT = 256
MAX_KEPT_CHARS = 2**23
MAX_MARK_SHOWN = 80
CompileOne = Callable[[GrammarSource], CompiledGrammar]


@frozen(kw_only=True)
class GrammarSetup:
    """What a compiler is made of: the engine's name, the tokenizer's folder and its end tokens.

    `is_for_checks`: no token is drawn and each form is asked for once, so that it may load less
    and keeps nothing: memory that is used again takes a fifth less time than new memory.
    """

    backend: str
    folder: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    is_for_checks: bool = False


def _check_grammar(source: GrammarSource) -> None:
    """Refuse a grammar that cannot be read, or has no answer that ends. Raises: ValueError."""
    if source.kind is GrammarKind.LARK:
        check_lark(source.text)
    elif "root" in never_ending(read_gbnf(source.text)):
        raise ValueError("rule 'root' never ends: every alternative contains itself")


@contextlib.contextmanager
def _told_of(mark: str) -> Iterator[None]:
    """Say behind which mark a schema stands that cannot be honoured."""
    try:
        yield
    except ValueError as error:
        if not mark:
            raise
        raise ValueError(f"behind {mark[-MAX_MARK_SHOWN:]!r}: {error}") from error


class GrammarCompiler:
    """Compile each grammar once; the engine and its vocabulary are loaded for the first.

    Safe for threads. Those whose engine is not take turns.
    """

    def __init__(self, setup: GrammarSetup, registry: Registry) -> None:
        self._setup = setup
        self._registry = registry
        self._engine: GrammarEngine | None = None
        self._kept: OrderedDict[GrammarSource, CompiledGrammar] = OrderedDict()
        self._kept_chars = 0
        self._lock = threading.RLock()

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Return the compiled grammar. Raises: ValueError saying what cannot be honoured."""
        if self._setup.is_for_checks:
            return self._compiled(source, self.engine().compile)
        with self._lock:
            found = self._kept.get(source)
            if found is not None:
                self._kept.move_to_end(source)
                return found
        with contextlib.nullcontext() if self.engine().compiles_in_threads else self._lock:
            found = self._compiled(source, self.engine().compile)
        with self._lock:
            if source not in self._kept:
                self._kept_chars += len(source.text)
            self._kept[source] = found
            while len(self._kept) > MAX_KEPT or self._kept_chars > MAX_KEPT_CHARS:
                oldest, _ = self._kept.popitem(last=False)
                self._kept_chars -= len(oldest.text)
        return found

    def knows(self, source: GrammarSource) -> bool:
        """Whether a grammar is compiled already."""
        with self._lock:
            return source in self._kept

    def compile_for_check(self, source: GrammarSource) -> CompiledGrammar:
        """Compile a grammar that no answer is made from. Raises: ValueError."""
        return self._compiled(source, self.engine().compile_for_check)

    def _compiled(self, source: GrammarSource, compile_one: CompileOne) -> CompiledGrammar:
        if source.kind is GrammarKind.STRUCTURAL_TAG:
            return self._compiled_tags(source, compile_one)
        if source.kind is GrammarKind.JSON_SCHEMA:
            check_schema(json.loads(source.text))
        elif source.kind in (GrammarKind.LARK, GrammarKind.GBNF):
            _check_grammar(source)
        return compile_one(source)

    def _compiled_tags(self, source: GrammarSource, compile_one: CompileOne) -> CompiledGrammar:
        """Compile a structural tag; where a schema in it is what fails, say which."""
        tree = source.tree
        parts = list(schemas_of(tree))
        for mark, schema in parts:
            with _told_of(mark):
                check_schema(schema)
        for node in nodes_of(tree):
            if node["type"] == "grammar":
                _check_grammar(GrammarSource.of_grammar(node["grammar"]))
        try:
            return compile_one(source)
        except ValueError:
            for mark, schema in parts:
                alone = GrammarSource(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))
                with _told_of(mark):
                    compile_one(alone)
            raise

    def engine(self) -> GrammarEngine:
        """Return the engine, loaded. Raises: PluginError, ConfigError."""
        with self._lock:
            if self._engine is None:
                setup = self._setup
                vocabulary = read_vocabulary(
                    setup.folder,
                    vocab_size=setup.vocab_size,
                    eos_token_ids=setup.eos_token_ids,
                    is_for_checks=setup.is_for_checks,
                )
                self._engine = load_grammar_engine(self._registry, setup.backend)(vocabulary)
            return self._engine
