"""Structural tags as Lark for llguidance: free text is lazy lexemes that end with a mark."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from quire.interfaces.grammar import GrammarKind, GrammarSource, Node
from quire_grammar.llguidance.gbnf import gbnf_to_lark
from quire_grammar.llguidance.lark import without_forcing
from quire_grammar.llguidance.regexes import exact_regex
from quire_grammar.llguidance.schemas import OWN_SETTINGS, exact_schema

ANY_TEXT = "/(?s:.*)/"
NOTHING = '""'
_UNESCAPED = re.compile(r"(\\.)|/|\n", re.DOTALL)
_ESCAPES = {"/": r"\/", "\n": r"\n"}


class TagGrammar:
    """Writes the rules of one tree, each under a name of its own.

    `special` are the texts of special tokens with their ids, which no text spells; `ends` those of
    end tokens. `json_settings` are the library's own, for every schema.
    """

    def __init__(
        self,
        special: Mapping[str, int],
        ends: Container[str],
        json_settings: Mapping[str, Any],
    ) -> None:
        self._special = special
        self._ends = ends
        self._json_settings = json_settings
        self._rules: list[str] = []
        self._grammars: list[dict[str, str]] = []
        self._has_lexemes = False  # of the client's own
        longest_first = sorted(special, key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def whole(self, tree: Node) -> str:
        """Return the grammar in the library's own form. Raises: ValueError saying why not."""
        start = self._node(tree)
        whole = "\n".join([f"start: {start}", *self._rules])
        if self._has_lexemes:
            whole = without_forcing(whole)
        if not self._grammars:
            return LLMatcher.grammar_from_lark(whole)
        outer = {"name": "tags", "lark_grammar": whole}
        return json.dumps({"grammars": [outer, *self._grammars]})

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _node(self, node: Node) -> str:
        found: str = getattr(self, f"_{node['type']}")(node)
        return found

    def _const_string(self, node: Node) -> str:
        return self._literal(node["value"])

    def _literal(self, text: str) -> str:
        """Return a text's parts, special tokens by their ids; nothing for an empty one."""
        parts, position = [], 0
        for found in self._special_text.finditer(text):
            parts += _quoted(text[position : found.start()])
            parts.append(self._token(found[0]))
            position = found.end()
        return " ".join(parts + _quoted(text[position:]))

    def _token(self, text: str) -> str:
        if text in self._ends:
            raise ValueError(f"{text!r} is an end token, which ends the answer; leave it out")
        return f"<[{self._special[text]}]>"

    def _json_schema(self, node: Node) -> str:
        schema = exact_schema(node["json_schema"])
        return self._rule(f"%json {json.dumps(schema | {OWN_SETTINGS: self._json_settings})}")

    def _regex(self, node: Node) -> str:
        self._has_lexemes = True
        return self._terminal(_regex(exact_regex(node["pattern"])))

    def _grammar(self, node: Node) -> str:
        """Return the name of a grammar whose rules are its own."""
        source = GrammarSource.of_grammar(node["grammar"])
        is_gbnf = source.kind is GrammarKind.GBNF
        lark = gbnf_to_lark(source.text) if is_gbnf else source.text
        name = f"g{len(self._grammars)}"
        self._grammars.append({"name": name, "lark_grammar": without_forcing(lark)})
        self._has_lexemes = True
        return self._rule(f"@{name}")

    def _any_text(self, node: Node) -> str:
        return self._terminal(_text_without(node["excludes"]))

    def _sequence(self, node: Node) -> str:
        return self._rule(" ".join(map(self._node, node["elements"])))

    def _or(self, node: Node) -> str:
        return self._one_of([self._node(each) for each in node["elements"]])

    def _optional(self, node: Node) -> str:
        return self._repeated(node, "?")

    def _plus(self, node: Node) -> str:
        return self._repeated(node, "+")

    def _star(self, node: Node) -> str:
        return self._repeated(node, "*")

    def _repeated(self, node: Node, mark: str) -> str:
        return self._rule(f"({self._node(node['content'])}){mark}")

    def _tag(self, node: Node) -> str:
        return self._rule(self._after(node, ""))

    def _after(self, tag: Node, trigger: str) -> str:
        """Return a tag's parts behind a trigger that was met."""
        content, ends = tag["content"], tag["end"]
        parts = [self._literal(tag["begin"][len(trigger) :])]
        if content["type"] == "any_text" and all(ends):
            parts.append(self._text_until(ends, content["excludes"]))
        else:
            parts.append(self._node(content))
            parts.append(self._one_of([self._literal(end) for end in ends]))
        return " ".join(filter(None, parts)) or NOTHING

    def _one_of(self, alternatives: Sequence[str]) -> str:
        if len(alternatives) == 1:
            return alternatives[0]
        return self._rule(" | ".join(each or NOTHING for each in alternatives))

    def _text_until(self, ends: Sequence[str], excludes: Sequence[str]) -> str:
        """Return text up to the first of some marks, and the mark."""
        return self._one_of([self._head(end, excludes, ends) for end in ends])

    def _head(self, mark: str, excludes: Sequence[str], marks: Sequence[str]) -> str:
        """Return text that a mark ends, and the mark."""
        if mark in self._special:
            text = self._terminal(_text_without([*excludes, *marks]))
            return self._rule(f"{text} {self._token(mark)}")
        inner = self._special_text.search(mark)
        if inner is not None:
            raise ValueError(
                f"the mark {mark!r} has the special token {inner[0]!r} beside other text; "
                "give the token alone"
            )
        text = self._terminal(_text_without([each for each in excludes if each != mark]))
        return self._rule(f"{text} {_quoted(mark)[0]}", "[lazy]")

    def _triggered_tags(self, node: Node) -> str:
        tags, triggers, excludes = node["tags"], node["triggers"], node["excludes"]
        triggered = []
        for trigger in triggers:
            own = [tag for tag in tags if tag["begin"].startswith(trigger)]
            bodies = self._one_of([self._after(tag, trigger) for tag in own])
            triggered.append(f"{self._head(trigger, excludes, triggers)} {bodies}")
        one = self._one_of(triggered)
        rest = self._terminal(_text_without([*triggers, *excludes]))
        first = self._one_of([self._tag(tag) for tag in tags]) if node["at_least_one"] else ""
        if node["stop_after_first"]:
            return first or self._rule(f"{one} | {rest}")
        return self._rule(f"{first} ({one})* {rest}".strip())

    def _tags_with_separator(self, node: Node) -> str:
        one = self._rule(self._one_of([self._tag(tag) for tag in node["tags"]]))
        separator = self._literal(node["separator"])
        many = one if node["stop_after_first"] else f"{one} ({separator} {one})*"
        return self._rule(many if node["at_least_one"] else f"({many})?")


def _quoted(text: str) -> list[str]:
    return [json.dumps(text, ensure_ascii=False)] if text else []


def _regex(pattern: str) -> str:
    """Return a terminal of a regex: slashes and line ends are escaped unless they are already."""
    escaped = _UNESCAPED.sub(lambda found: found[1] or _ESCAPES[found[0]], pattern)
    return f"/{escaped}/"


def _text_without(marks: Sequence[str]) -> str:
    """Return a terminal of any text that has none of some marks in it."""
    found = "|".join(_escaped(mark) for mark in dict.fromkeys(marks))
    return f"{ANY_TEXT} & ~/(?s:.*)({found})(?s:.*)/" if found else ANY_TEXT


def _escaped(mark: str) -> str:
    """Return a regex of a text: characters that mean something, and others, by their numbers."""
    return "".join(
        char if char.isascii() and char.isalnum() else rf"\x{{{ord(char):x}}}" for char in mark
    )
