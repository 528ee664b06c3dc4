"""What must hold of a grammar engine: one function a check, which judges one case."""

from __future__ import annotations

import contextlib
import functools
import json
import random
from collections.abc import Iterator

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from quire.interfaces.grammar import (
    CompiledGrammar,
    GrammarEngine,
    GrammarKind,
    GrammarMatcher,
    GrammarSource,
    GrammarStuck,
    GrammarVocabulary,
)
from quire.testing.grammar_cases import (
    END,
    NUM_BYTES,
    SECOND_END,
    SPECIAL,
    GrammarCase,
    Keyword,
    is_answer,
    vocabulary,
)
from quire.testing.kit_report import Failure

MOST_TOKENS = 80
# Some of the bytes that a mask leaves out: each costs a matcher.
TRIED = 12
POISON = 0x5A5A5A5A
ENDS = (END, SECOND_END)


@frozen
class GrammarSubject:
    """The engine that is checked; it is made once a vocabulary."""

    engine: type[GrammarEngine]

    def made(self, *, parts: bool) -> GrammarEngine:
        """Return the engine of a vocabulary."""
        return _made(self.engine, parts)

    def compiled(self, case: GrammarCase) -> CompiledGrammar | None:
        """Return a case's grammar, None where the engine refuses it in words."""
        try:
            return self.made(parts=case.parts).compile(case.source)
        except ValueError as error:
            if not str(error).strip():
                raise AssertionError("it refuses a form without a word") from error
            return None


@functools.cache
def _made(engine: type[GrammarEngine], parts: bool) -> GrammarEngine:
    return engine(words_of(parts))


@functools.cache
def words_of(parts: bool) -> GrammarVocabulary:
    """Return the vocabulary with or without longer tokens."""
    return vocabulary(parts=parts)


def mask_of(matcher: GrammarMatcher, parts: bool) -> NDArray[np.bool_]:
    """Return which ids a mask allows, those beyond the vocabulary included; it held others."""
    words = (words_of(parts).vocab_size + 31) // 32
    mask = np.full(words, POISON, np.int32)
    matcher.fill_mask(mask)
    return np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)


def accepts(grammar: CompiledGrammar, token_ids: list[int]) -> bool:
    """Whether a new matcher goes through all tokens."""
    matcher = grammar.start()
    try:
        for token_id in token_ids:
            matcher.accept(token_id)
    except GrammarStuck:
        return False
    return True


@frozen
class Place:
    """Where a walk stands: the tokens before, their text, and what may come."""

    matcher: GrammarMatcher
    token_ids: list[int]
    text: bytes
    allowed: NDArray[np.bool_]


def walk(grammar: CompiledGrammar, case: GrammarCase) -> Iterator[Place]:
    """Yield each place of a random answer, to its end or to `MOST_TOKENS`."""
    tokens, matcher = words_of(case.parts).tokens, grammar.start()
    token_ids: list[int] = []
    draw, text = random.Random(case.seed), b""
    for _ in range(MOST_TOKENS):
        allowed = mask_of(matcher, case.parts)
        yield Place(matcher, list(token_ids), text, allowed)
        # Plain letters more often than others, so that answers end.
        choices = [int(i) for i in np.flatnonzero(allowed) if i not in ENDS]
        if not choices or (any(allowed[i] for i in ENDS) and draw.random() < 0.4):
            return
        plain = [i for i in choices if tokens[i : i + 1] and tokens[i].isalnum()]
        token_id = draw.choice(plain if plain and draw.random() < 0.5 else choices)
        matcher.accept(token_id)
        token_ids.append(token_id)
        text += tokens[token_id]


def check_answers(subject: GrammarSubject, case: GrammarCase) -> Failure | None:
    """An end token may come where the text is of the form, and nowhere else."""
    grammar = subject.compiled(case)
    if grammar is None:
        return None
    for place in walk(grammar, case):
        what = _strange(case, place) or _wrong_end(case, place)
        if what is not None:
            return Failure(what=f"after {place.text!r} {what}", case=case)
    return None


def _strange(case: GrammarCase, place: Place) -> str | None:
    """Say which id may come that is no text and no end."""
    count = len(words_of(case.parts).tokens)
    ids = np.flatnonzero(place.allowed).tolist()
    strange = [i for i in ids if i >= count or (NUM_BYTES <= i <= SPECIAL and i not in ENDS)]
    return f"id {strange[0]} may come, which is no text" if strange else None


def _wrong_end(case: GrammarCase, place: Place) -> str | None:
    may_end = [bool(place.allowed[i]) for i in ENDS]
    if len(set(may_end)) > 1:
        return "one end token may come and the other may not"
    is_whole = is_answer(case, place.text)
    if may_end[0] and not is_whole:
        return "an end token may come, and the text is not of the form"
    if is_whole and not may_end[0]:
        return "no end token may come, and the text is of the form"
    others = np.flatnonzero(place.allowed)
    if place.matcher.is_terminated() and not set(others.tolist()) <= set(ENDS):
        return "is_terminated says that nothing but an end token may come, and the mask has others"
    if not len(others):
        return "no token may come, and the matcher does not raise GrammarStuck"
    return None


def check_masks(subject: GrammarSubject, case: GrammarCase) -> Failure | None:
    """A mask has the tokens that are accepted, and no others."""
    grammar = subject.compiled(case)
    if grammar is None:
        return None
    tokens, draw = words_of(case.parts).tokens, random.Random(case.seed)
    for place in list(walk(grammar, case))[:: 1 + case.seed % 3]:
        after = f"after {place.text!r}"
        ids = np.flatnonzero(place.allowed).tolist()
        for token_id in _some(draw, ids):
            if not accepts(grammar, [*place.token_ids, token_id]):
                what = f"{after} the mask has {_name(tokens, token_id)}, and accept refuses it"
                return Failure(what=what, case=case)
        others = [i for i in range(NUM_BYTES) if not place.allowed[i]]
        for token_id in _some(draw, [] if case.parts else others):
            if accepts(grammar, [*place.token_ids, token_id]):
                what = f"{after} the mask has not {_name(tokens, token_id)}, and accept takes it"
                return Failure(what=what, case=case)
    return None


def _some(draw: random.Random, ids: list[int]) -> list[int]:
    return ids if len(ids) <= TRIED else draw.sample(ids, TRIED)


def _name(tokens: object, token_id: int) -> str:
    return f"token {token_id} {tokens[token_id]!r}"  # type: ignore[index]


def check_vocabularies(subject: GrammarSubject, case: GrammarCase) -> Failure | None:
    """Longer tokens allow the texts that bytes allow: each next byte, and no others."""
    grammar = subject.compiled(case)
    bytewise = subject.made(parts=False)
    if grammar is None:
        return None
    by_bytes, tokens = bytewise.compile(case.source), words_of(case.parts).tokens
    for place in walk(grammar, case):
        matcher = by_bytes.start()
        for byte in place.text:
            matcher.accept(byte)
        own = {int(i) for i in np.flatnonzero(place.allowed) if i not in ENDS}
        first = {tokens[i][0] for i in own}
        wanted = set(np.flatnonzero(mask_of(matcher, False)[:NUM_BYTES]).tolist())
        if first != wanted:
            byte = min(first ^ wanted)
            whose = "longer tokens" if byte in first else "single bytes"
            what = f"after {place.text!r} {bytes([byte])!r} may come by {whose} alone"
            return Failure(what=what, case=case)
        for token_id in own:
            if not accepts(by_bytes, [*place.text, *tokens[token_id]]):
                what = f"after {place.text!r} {_name(tokens, token_id)} may come, its bytes not"
                return Failure(what=what, case=case)
    return None


def check_apart(subject: GrammarSubject, case: GrammarCase) -> Failure | None:
    """A matcher stands where its own tokens lead, whatever others of its grammar do."""
    grammar = subject.compiled(case)
    if grammar is None:
        return None
    places = list(walk(grammar, case))
    quiet, other = grammar.start(), grammar.start()
    first = mask_of(quiet, case.parts)
    for place in places[1:]:
        other.accept(place.token_ids[-1])
        mask_of(other, case.parts)
    if not np.array_equal(mask_of(quiet, case.parts), first):
        what = "a matcher that accepted nothing is moved by another of its grammar"
        return Failure(what=what, case=case, guess="start returns what it returned before")
    for place in places[1:]:
        quiet.accept(place.token_ids[-1])
        if not np.array_equal(mask_of(quiet, case.parts), place.allowed):
            what = f"after {place.text!r} a second matcher has another mask than the first had"
            return Failure(what=what, case=case)
    return None


def check_steps(subject: GrammarSubject, case: GrammarCase) -> Failure | None:
    """The masks and tokens of a step, handed over at once, are those of each matcher."""
    grammar = subject.compiled(case)
    if grammar is None:
        return None
    places = list(walk(grammar, case))
    paths = [place.token_ids for place in places[:: max(1, len(places) // 4)]]
    matchers = [_led(grammar, path) for path in paths]
    kind, words = type(matchers[0]), (words_of(case.parts).vocab_size + 31) // 32
    masks = np.full((len(matchers), words), POISON, np.int32)
    raised = kind.fill_masks(matchers, masks)
    if len(raised) != len(matchers) or any(raised):
        return Failure(what=f"fill_masks of {len(matchers)} matchers returns {raised}", case=case)
    for number, path in enumerate(paths):
        bits = np.unpackbits(masks[number].view(np.uint8), bitorder="little").astype(bool)
        if not np.array_equal(bits, mask_of(_led(grammar, path), case.parts)):
            return Failure(what=f"fill_masks fills row {number} otherwise than alone", case=case)
    return _check_accept_each(case, grammar, paths, matchers)


def _led(grammar: CompiledGrammar, token_ids: list[int]) -> GrammarMatcher:
    matcher = grammar.start()
    for token_id in token_ids:
        matcher.accept(token_id)
    return matcher


def _check_accept_each(
    case: GrammarCase,
    grammar: CompiledGrammar,
    paths: list[list[int]],
    matchers: list[GrammarMatcher],
) -> Failure | None:
    """Give each matcher its first allowed token, but the last one a token that may not come."""
    masks = [mask_of(matcher, case.parts) for matcher in matchers]
    given = [int(np.flatnonzero(mask)[0]) for mask in masks]
    wrong = np.flatnonzero(~masks[-1][:NUM_BYTES])
    if not case.parts and len(wrong):
        given[-1] = int(wrong[case.seed % len(wrong)])
    raised = type(matchers[0]).accept_each(matchers, given)
    expected = [not accepts(grammar, [*path, i]) for path, i in zip(paths, given, strict=True)]
    if [error is not None for error in raised] != expected:
        return Failure(what=f"accept_each of {given} returns {raised}", case=case)
    strange = [one for one in raised if one is not None and not isinstance(one, GrammarStuck)]
    if strange:
        what = f"a token that may not come is {type(strange[0]).__name__}, not GrammarStuck"
        return Failure(what=what, case=case)
    return None


def check_keyword(subject: GrammarSubject, keyword: Keyword) -> Failure | None:
    """A keyword is enforced, or refused by its name; never ignored."""
    source = GrammarSource(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(keyword.schema))
    engine = subject.made(parts=False)
    try:
        grammar = engine.compile(source)
    except ValueError as error:
        if keyword.name not in str(error):
            what = f"the refusal does not name the keyword {keyword.name!r}: {error}"
            return Failure(what=what, case=keyword)
        with contextlib.suppress(ValueError):
            engine.compile_for_check(source)
            what = f"compile refuses keyword {keyword.name!r}, compile_for_check does not"
            return Failure(what=what, case=keyword)
        return None
    if not accepts(grammar, [*keyword.forbidden.encode(), END]):
        return None
    what = f"keyword {keyword.name!r} is ignored: {keyword.forbidden} can be written"
    return Failure(what=what, case=keyword)
