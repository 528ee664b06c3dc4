"""GBNF in xgrammar's own EBNF, which differs in escapes and names."""

from __future__ import annotations

from collections.abc import Mapping

from quire.interfaces.gbnf import (
    Characters,
    InTurn,
    OneOf,
    Part,
    Repeated,
    RuleName,
    Text,
    never_ending,
    read_gbnf,
)
from quire_grammar.xgrammar.character_sets import without


def gbnf_to_ebnf(text: str) -> str:
    """Return the same grammar, its characters by their numbers. Raises: ValueError."""
    rules = read_gbnf(text)
    endless = never_ending(rules)
    if endless:  # such rules end the process, also where nothing names them
        raise ValueError(f"rule {min(endless)!r} never ends: every alternative contains itself")
    names = {name: f"r{number}" for number, name in enumerate(rules)}
    names["root"] = "root"
    return "\n".join(f"{names[name]} ::= {_part(part, names)}" for name, part in rules.items())


def _part(part: Part, names: Mapping[str, str]) -> str:
    if isinstance(part, RuleName):
        return names[part.name]
    if isinstance(part, Text):
        return f'"{"".join(map(_escaped, part.value))}"'
    if isinstance(part, Characters):
        return _characters(part)
    if isinstance(part, Repeated):
        most = "" if part.most is None else part.most
        return f"({_part(part.part, names)}){{{part.least},{most}}}"
    if isinstance(part, OneOf):
        return f"({' | '.join(_part(one, names) for one in part.parts)})"
    assert isinstance(part, InTurn), "there is no other part"
    return f"({' '.join(_part(one, names) for one in part.parts)})" if part.parts else '""'


def _characters(part: Characters) -> str:
    others = without(part.ranges)
    ranges = others if part.is_negated else without(others)
    if not ranges:
        raise ValueError("characters without any, [], are not supported by xgrammar")
    return f"[{''.join(f'{_escaped(chr(low))}-{_escaped(chr(high))}' for low, high in ranges)}]"


def _escaped(character: str) -> str:
    code = ord(character)
    if character.isascii() and character.isalnum():
        return character
    return f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"
