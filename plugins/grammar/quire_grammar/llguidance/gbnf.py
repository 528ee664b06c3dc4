"""GBNF as Lark: what has no recursion in it is one lexeme, which the lexer matches exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping

from quire.interfaces.gbnf import (
    ANY_CHARACTER,
    Characters,
    InTurn,
    OneOf,
    Part,
    Repeated,
    RuleName,
    Text,
    names_in,
    read_gbnf,
    rules_that_name,
)

NOTHING = '""'


def gbnf_to_lark(text: str) -> str:
    """Return the same grammar in llguidance's Lark. Raises: ValueError saying where it is wrong.

    A part of a recursive rule that holds no recursion is a lexeme too, and as lexemes are matched
    as long as it can: such a grammar has fewer answers where what follows could begin the same.
    """
    rules = read_gbnf(text)
    return _Writer(rules).lark()


class _Writer:
    def __init__(self, rules: Mapping[str, Part]) -> None:
        self._rules = rules
        self._recursive = _recursive(rules)
        self._names = {name: f"r{number}" for number, name in enumerate(rules)}
        self._lines: list[str] = []
        self._written: set[str] = set()
        self._todo = ["root"]

    def lark(self) -> str:
        while self._todo:
            name = self._todo.pop()
            if name in self._written:
                continue
            self._written.add(name)
            part = self._rules[name]
            if name in self._recursive:
                self._lines.append(f"{self._names[name]}: {self._rule(part)}")
            else:
                self._lines.append(f"{self._names[name].upper()}: {self._lexeme(part)}")
        return "\n".join([f"start: {self._reference('root')}", *self._lines])

    def _reference(self, name: str) -> str:
        self._todo.append(name)
        found = self._names[name]
        return found if name in self._recursive else found.upper()

    def _is_flat(self, part: Part) -> bool:
        return self._recursive.isdisjoint(names_in(part))

    def _rule(self, part: Part) -> str:
        """Return a part of a recursive rule, neighbours without recursion in lexemes."""
        if self._is_flat(part):
            return self._own_lexeme([part])
        if isinstance(part, RuleName):
            return self._reference(part.name)
        if isinstance(part, OneOf):
            return f"({' | '.join(map(self._rule, part.parts))})"
        if isinstance(part, Repeated):
            return f"({self._rule(part.part)}){_count(part)}"
        assert isinstance(part, InTurn), "texts and characters hold no recursion"
        found: list[str] = []
        flat: list[Part] = []
        for one in part.parts:
            if self._is_flat(one):
                flat.append(one)
                continue
            found += [self._own_lexeme(flat)] if flat else []
            found.append(self._rule(one))
            flat = []
        return " ".join(found + ([self._own_lexeme(flat)] if flat else []))

    def _own_lexeme(self, parts: list[Part]) -> str:
        if len(parts) == 1 and isinstance(parts[0], RuleName):
            return self._reference(parts[0].name)
        body = self._lexeme(InTurn(tuple(parts)))
        if body == NOTHING:
            return NOTHING
        name = f"L{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def _lexeme(self, part: Part) -> str:
        """Return a part without recursion as the body of a terminal."""
        if isinstance(part, RuleName):
            return self._reference(part.name)
        if isinstance(part, Text):
            return json.dumps(part.value)
        if isinstance(part, Characters):
            return _characters(part)
        if isinstance(part, OneOf):
            return f"({' | '.join(map(self._lexeme, part.parts))})"
        if isinstance(part, InTurn):
            return " ".join(map(self._lexeme, part.parts)) or NOTHING
        return f"({self._lexeme(part.part)}){_count(part)}"


def _recursive(rules: Mapping[str, Part]) -> set[str]:
    """Return the rules that name themselves, or lead to one that does."""
    used_by = rules_that_name(rules)
    left = {name: len(set(names_in(part))) for name, part in rules.items()}
    flat = [name for name, count in left.items() if not count]
    for name in flat:  # which grows
        for user in used_by.get(name, ()):
            left[user] -= 1
            if not left[user]:
                flat.append(user)
    return set(rules) - set(flat)


def _characters(part: Characters) -> str:
    if part == ANY_CHARACTER:
        return "/(?s:.)/"
    if not part.ranges:
        return r"/[^\s\S]/"  # which nothing matches
    ranges = "".join(rf"\x{{{low:x}}}-\x{{{high:x}}}" for low, high in part.ranges)
    return f"/[{'^' * part.is_negated}{ranges}]/"


def _count(part: Repeated) -> str:
    if part.most is None:
        return {0: "*", 1: "+"}.get(part.least, f"{{{part.least},}}")
    return f"{{{part.least},{part.most}}}"
