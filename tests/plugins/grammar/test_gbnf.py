"""GBNF is read as llama.cpp reads it, and every engine's answers are of the grammar."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping

import pytest

from quire.constraints import GrammarKind, GrammarSource
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
from quire.interfaces.grammar import GrammarEngine, GrammarStuck

END = 256
# The grammar of JSON that llama.cpp comes with, in its own spelling.
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws # text
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


def matches(engine: GrammarEngine, grammar: str, answers: list[str]) -> list[str]:
    """Return the answers that a grammar has."""
    compiled = engine.compile(GrammarSource(kind=GrammarKind.GBNF, text=grammar))
    found = []
    for answer in answers:
        matcher = compiled.start()
        try:
            for token in [*answer.encode(), END]:
                matcher.accept(token)
        except GrammarStuck:
            continue
        found.append(answer)
    return found


@pytest.mark.parametrize(
    ("grammar", "whole", "wrong"),
    [
        (
            JSON,
            ['{"a":{"b":[1,-2.5e3,"x\\n\\u00e9",null]} }', '{ "é":"日本"}'],
            ["[]", '{"a":tru}'],
        ),
        ('root ::= [a-z]+ "x"', ["xx", "abcxx"], ["x", "ab"]),
        ('root ::= "abc" | [a-z] [a-z] "d"', ["abc", "abd"], ["abx"]),
        (
            'root ::= e\ne ::= t ("+" t)*\nt ::= [0-9]+ | "(" e ")"',
            ["1+(2+34)", "((1))"],
            ["1+", "()"],
        ),
        ('root ::= [à-ü]{2,3} "\\u00e9\\x41\\U0001F600" .', ["àüéA😀\n"], ["éàA"]),
        ('root ::= "a" root | ""', ["", "aaa"], ["b"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["a", ""]),
        ('root ::= [^ab-] [a-] "\\"\\\\"', ['z-"\\', '\na"\\'], ['--"\\', 'zz"\\']),
        ('# c\nroot ::= x-1 # d\n\nx-1 ::= "1" |\n "2"\n  | "3"\n', ["1", "2", "3"], ["4"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_grammar_has_its_answers(
    engine: GrammarEngine, grammar: str, whole: list[str], wrong: list[str]
) -> None:
    assert matches(engine, grammar, whole + wrong) == whole


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= "a', "line 1, column 12: expected the '\"' that ends a text, found 'the end'"),
        ("root ::= x", "rule 'root' names 'x', which is no rule"),
        ('a ::= "b"', "there is no rule 'root'; there are a"),
        ('root ::= ("a"', "expected '\\)'"),
        ('root ::= "a"\nb = "a"', "line 2, column 3: expected '::=' behind 'b', found '= \"a\"'"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 1: rule 'root' is there already"),
        ("root ::= [z-a]", "a range from 'z' to 'a'"),
        ("root ::= [a\n]", "expected the ']' that ends the characters"),
        ('root ::= "\\q"', "an escape that is not known"),
        ('root ::= "\\u12"', "expected 4 hexadecimal digits behind"),
        ('root ::= "\\ud800"', "is no character"),
        ('root ::= "a"{3,2}', "counts go up to 2000, the second not below the first"),
        ('root ::= "a"{2001}', "counts go up to 2000"),
        ('root ::= "a"{x}', "expected a count such as"),
        ("root ::= <[5]>", "tokens are not supported"),
        ("root ::= *", "expected a part of the rule"),
        ("root ::= " + "(" * 100_000, "nested deeper than allowed: 64 levels"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_told_by_line_and_column(grammar: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_gbnf(grammar)


@pytest.mark.parametrize(
    ("grammar", "rules"),
    [
        ('root ::= "a" root', {"root"}),
        ('root ::= a | "x"\na ::= b "y"\nb ::= a+', {"a", "b"}),
        ('root ::= ("a" root)*', set()),
        ("root ::= [] | .", set()),
        ("root ::= []{1,3}", {"root"}),
    ],
)
def test_rules_without_an_end_are_known(grammar: str, rules: set[str]) -> None:
    assert never_ending(read_gbnf(grammar)) == rules


class Maker:
    """Draw rules over the letters a and b, as text; with `recursive` they may name any rule."""

    def __init__(self, seed: int, *, recursive: bool) -> None:
        self._draw = random.Random(seed)
        self._recursive = recursive

    def make(self) -> str:
        names = ["root", "x", "y"]
        lines = []
        for position, name in enumerate(names):
            later = names if self._recursive else names[position + 1 :]
            lines.append(f"{name} ::= {self._part(later, 0)}")
        return "\n".join(lines)

    def _part(self, names: list[str], depth: int) -> str:
        draw = self._draw
        kinds = ["text", "set", *["name"] * bool(names)]
        kinds += ["turn", "or", "repeat", "turn", "or"] if depth < 3 else []
        kind = draw.choice(kinds)
        if kind == "text":
            return f'"{draw.choice(["a", "b", "ab", "ba", ""])}"'
        if kind == "set":
            return draw.choice(["[a]", "[ab]", "[^a]", "[^b]"])
        if kind == "name":
            return draw.choice(names)
        if kind == "repeat":
            return f"({self._part(names, depth + 1)}){draw.choice(['*', '+', '?', '{2}', '{1,2}'])}"
        parts = [self._part(names, depth + 1) for _ in range(draw.randint(2, 3))]
        return f"({(' ' if kind == 'turn' else ' | ').join(parts)})"


class Naive:
    """Matches a text by trying everything: from no rule known to match, until nothing is added."""

    def __init__(self, rules: Mapping[str, Part], text: str) -> None:
        self._text = text
        self._known: dict[tuple[str, int], set[int]] = {}
        places = list(itertools.product(rules, range(len(text) + 1)))
        size = -1
        while size != (size := sum(map(len, self._known.values()))):
            for name, at in places:
                found = self._ends(rules[name], {at})
                self._known[name, at] = self._known.get((name, at), set()) | found

    def is_whole(self) -> bool:
        return len(self._text) in self._known["root", 0]

    def _ends(self, part: Part, places: set[int]) -> set[int]:
        if isinstance(part, Text):
            return {p + len(part.value) for p in places if self._text.startswith(part.value, p)}
        if isinstance(part, Characters):
            return {p + 1 for p in places if p < len(self._text) and self._is_in(part, p)}
        if isinstance(part, RuleName):
            return set().union(*(self._known.get((part.name, p), set()) for p in places))
        if isinstance(part, OneOf):
            return set().union(*(self._ends(one, places) for one in part.parts))
        if isinstance(part, InTurn):
            return functools.reduce(lambda before, one: self._ends(one, before), part.parts, places)
        return self._repeated(part, places)

    def _is_in(self, part: Characters, place: int) -> bool:
        code = ord(self._text[place])
        return any(low <= code <= high for low, high in part.ranges) != part.is_negated

    def _repeated(self, part: Repeated, places: set[int]) -> set[int]:
        found = places if part.least == 0 else set()
        for count in range(1, (part.most or len(self._text) + part.least + 1) + 1):
            places = self._ends(part.part, places)
            found = found | places if count >= part.least else found
        return found


TEXTS = ["".join(letters) for n in range(5) for letters in itertools.product("ab", repeat=n)]


def wanted_of(grammar: str) -> list[str]:
    rules = read_gbnf(grammar)
    return [text for text in TEXTS if Naive(rules, text).is_whole()]


def drawn(*, recursive: bool) -> list[str]:
    """Return grammars that have some of the texts and not others, and no rule without an end."""
    made = (Maker(seed, recursive=recursive).make() for seed in itertools.count())
    ending = (grammar for grammar in made if not never_ending(read_gbnf(grammar)))
    return list(itertools.islice((g for g in ending if 0 < len(wanted_of(g)) < len(TEXTS)), 40))


@pytest.mark.parametrize("grammar", drawn(recursive=False))
def test_without_recursion_answers_are_exactly_those_of_the_grammar(
    engine: GrammarEngine, grammar: str
) -> None:
    assert matches(engine, grammar, TEXTS) == wanted_of(grammar)


@pytest.mark.parametrize("grammar", drawn(recursive=True))
def test_with_recursion_answers_are_of_the_grammar(engine: GrammarEngine, grammar: str) -> None:
    """llguidance takes lexemes as long as it can, and may then miss some."""
    found, wanted = matches(engine, grammar, TEXTS), wanted_of(grammar)

    assert set(found) <= set(wanted)
    assert found == wanted or "llguidance" in type(engine).__module__
