"""Grammars compiled and matched by xgrammar (C++); what it would loosen is refused before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray

from quire.interfaces.grammar import (
    CompiledGrammar,
    GrammarEngine,
    GrammarKind,
    GrammarMatcher,
    GrammarSource,
    GrammarStuck,
    GrammarVocabulary,
    Node,
)
from quire_grammar.xgrammar.grammars import gbnf_to_ebnf
from quire_grammar.xgrammar.regexes import exact_regex
from quire_grammar.xgrammar.schemas import prepare_schema

# Between JSON's tokens; without an end, a model that likes spaces would never finish.
MAX_WHITESPACE = 16
NUM_THREADS = 2
MAX_ERROR_CHARS = 200
# Fields of a node whose texts an answer has in it.
SPELLED = ("value", "begin", "end", "separator", "triggers")
ANY_OBJECT = {"type": "object"}


class XGrammarEngine(GrammarEngine):
    """Compile with xgrammar."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        special = vocabulary.special_token_ids | set(vocabulary.eos_token_ids)
        tokens = vocabulary.tokens
        self._special = [
            text
            for i in sorted(special)
            if i < len(tokens) and (text := tokens[i].decode(errors="replace"))
        ]
        self._ids = _Ids(vocabulary.eos_token_ids, vocabulary.vocab_size)
        # Without bytes a token is special and never comes. An end token may be one that the
        # tokenizer does not know.
        padded = [*tokens, *[b""] * (vocabulary.vocab_size - len(tokens))]
        info = xgrammar.TokenizerInfo(
            [b"" if i in special else token for i, token in enumerate(padded)],
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=vocabulary.vocab_size,
            stop_token_ids=list(vocabulary.eos_token_ids),
        )
        self._compiler = xgrammar.GrammarCompiler(
            info, max_threads=NUM_THREADS, cache_enabled=False
        )

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Compile a grammar."""
        try:
            found = self._compiled(source)
        except RuntimeError as error:
            raise ValueError(_reason(error)) from error
        return _Compiled(found, self._ids)

    def _compiled(self, source: GrammarSource) -> Any:
        kind = source.kind
        if kind is GrammarKind.JSON_SCHEMA:
            return self._schema(json.loads(source.text))
        if kind is GrammarKind.JSON_OBJECT:
            return self._schema(dict(ANY_OBJECT))
        if kind is GrammarKind.REGEX:
            return self._compiler.compile_regex(exact_regex(source.text))
        if kind is GrammarKind.GBNF:
            return self._compiler.compile_grammar(gbnf_to_ebnf(source.text))
        if kind is GrammarKind.CHOICE:
            texts = [{"type": "const_string", "value": text} for text in source.choices]
            return self._tags({"type": "or", "elements": texts})
        if kind is GrammarKind.STRUCTURAL_TAG:
            return self._tags(source.tree)
        raise ValueError(_no_lark())

    def _schema(self, schema: Any) -> Any:
        prepare_schema(schema)
        return self._compiler.compile_json_schema(
            json.dumps(schema), strict_mode=False, max_whitespace_cnt=MAX_WHITESPACE
        )

    def _tags(self, tree: Node) -> Any:
        for node in _nodes(tree):
            self._check_texts(node)
            if node["type"] == "json_schema":
                prepare_schema(node["json_schema"])
                node["max_whitespace_cnt"] = MAX_WHITESPACE
            elif node["type"] == "regex":
                node["pattern"] = exact_regex(node["pattern"])
            elif node["type"] == "grammar":
                if GrammarSource.of_grammar(node["grammar"]).kind is not GrammarKind.GBNF:
                    raise ValueError(_no_lark())
                node["grammar"] = gbnf_to_ebnf(node["grammar"])
        tag = {"type": "structural_tag", "format": tree}
        return self._compiler.compile_structural_tag(json.dumps(tag))

    def _check_texts(self, node: Node) -> None:
        for name in SPELLED:
            given = node.get(name, ())
            for text in [given] if isinstance(given, str) else given:
                found = next((each for each in self._special if each in text), None)
                if found is not None:
                    raise ValueError(
                        f"{text!r} has the special token {found!r}, which xgrammar cannot write "
                        "as text; --grammar-backend llguidance can"
                    )


class _Ids:
    """End tokens, and which bits of a mask's last word are tokens."""

    def __init__(self, eos: tuple[int, ...], vocab_size: int) -> None:
        self.eos = eos
        self.last_bits = np.uint32(2 ** ((vocab_size - 1) % 32 + 1) - 1)


class _Compiled(CompiledGrammar):
    def __init__(self, compiled: Any, ids: _Ids) -> None:
        self._compiled = compiled
        self._ids = ids

    def start(self) -> GrammarMatcher:
        return _Matcher(xgrammar.GrammarMatcher(self._compiled), self._ids)


class _Matcher(GrammarMatcher):
    def __init__(self, matcher: Any, ids: _Ids) -> None:
        self._matcher = matcher
        self._ids = ids

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        words = mask.view(np.uint32)
        if self._matcher.is_terminated():
            words.fill(0)
            for token_id in self._ids.eos:
                words[token_id // 32] |= np.uint32(1 << token_id % 32)
            return
        self._matcher.fill_next_token_bitmask(mask.reshape(1, -1))
        # The library sets those behind the vocabulary too.
        words[-1] &= self._ids.last_bits

    def accept(self, token_id: int) -> None:
        if self._matcher.is_terminated() and token_id in self._ids.eos:
            return
        if not self._matcher.accept_token(token_id):
            raise GrammarStuck(f"token {token_id} may not come")

    def is_terminated(self) -> bool:
        return bool(self._matcher.is_terminated())


def _nodes(tree: Node) -> Iterator[Node]:
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        todo += [*node.get("elements", ()), *node.get("tags", ())]
        todo += [node["content"]] if "content" in node else []


def _no_lark() -> str:
    return "Lark grammars are not read by xgrammar; write GBNF, or use --grammar-backend llguidance"


def _reason(error: Exception) -> str:
    """Return the library's error without the place in its sources."""
    text = " ".join(str(error).split()).partition(": ")[2] or str(error)
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 3] + "..."
