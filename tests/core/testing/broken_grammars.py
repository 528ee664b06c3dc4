"""Grammar engines with one mistake each, around one that is right."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
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
from quire_grammar.llguidance.engine import LLGuidanceEngine


class Matcher(GrammarMatcher):
    """Hands everything on."""

    def __init__(self, own: GrammarMatcher) -> None:
        self.own = own

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        self.own.fill_mask(mask)

    def accept(self, token_id: int) -> None:
        self.own.accept(token_id)

    def is_terminated(self) -> bool:
        return self.own.is_terminated()

    @staticmethod
    def set_bit(mask: NDArray[np.int32], token_id: int) -> None:
        mask.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)


class Compiled(CompiledGrammar):
    matcher: ClassVar[type[Matcher]] = Matcher

    def __init__(self, own: CompiledGrammar) -> None:
        self.own = own

    def start(self) -> GrammarMatcher:
        return self.matcher(self.own.start())


class Engine(GrammarEngine):
    compiled: ClassVar[type[Compiled]] = Compiled

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.own = LLGuidanceEngine(vocabulary)

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        return self.compiled(self.own.compile(source))


def engine_of(kind: type[Matcher]) -> type[Engine]:
    compiled = type("Compiled", (Compiled,), {"matcher": kind})
    return type(kind.__name__, (Engine,), {"compiled": compiled})


class AddsToTheMask(Matcher):
    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        before = mask.copy()
        super().fill_mask(mask)
        mask |= before


class EndsAnywhere(Matcher):
    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        super().fill_mask(mask)
        for token_id in (256, 257):
            self.set_bit(mask, token_id)


class KnowsOneEnd(Matcher):
    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        super().fill_mask(mask)
        mask.view(np.uint32)[257 // 32] &= ~np.uint32(1 << 257 % 32)


class AllowsPadding(Matcher):
    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        super().fill_mask(mask)
        mask[-1] = -1


class TakesAnything(Matcher):
    def accept(self, token_id: int) -> None:
        with contextlib.suppress(GrammarStuck):
            super().accept(token_id)


class RaisesItsOwn(Matcher):
    def accept(self, token_id: int) -> None:
        try:
            super().accept(token_id)
        except GrammarStuck as error:
            raise KeyError(token_id) from error


class IsOverEarly(Matcher):
    def is_terminated(self) -> bool:
        return True


class ForgetsAByte(Matcher):
    """Leaves "a" out."""

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        super().fill_mask(mask)
        mask.view(np.uint32)[ord("a") // 32] &= ~np.uint32(1 << ord("a") % 32)


class TurnsStepsAround(Matcher):
    @classmethod
    def fill_masks(
        cls, matchers: Sequence[GrammarMatcher], masks: NDArray[np.int32]
    ) -> list[Exception | None]:
        return super().fill_masks(matchers[::-1], masks)


class SilentInSteps(Matcher):
    @classmethod
    def accept_each(
        cls, matchers: Sequence[GrammarMatcher], token_ids: Sequence[int]
    ) -> list[Exception | None]:
        super().accept_each(matchers, token_ids)
        return [None] * len(matchers)


class SharesItsMatcher(Engine):
    class compiled(Compiled):  # noqa: N801  the name of the base's
        def start(self) -> GrammarMatcher:
            if not hasattr(self, "kept"):
                self.kept = super().start()
            return self.kept


class DropsKeywords(Engine):
    """Leaves out what llguidance refuses."""

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        if source.kind is GrammarKind.JSON_SCHEMA:
            schema: Any = json.loads(source.text)
            schema.pop("uniqueItems", None)
            source = GrammarSource(kind=source.kind, text=json.dumps(schema))
        return super().compile(source)


class ChecksLess(Engine):
    """Lets a check see what it would not compile."""

    def compile_for_check(self, source: GrammarSource) -> CompiledGrammar:
        any_object = GrammarSource(kind=GrammarKind.JSON_OBJECT, text="")
        return self.compile(any_object if source.kind is GrammarKind.JSON_SCHEMA else source)


class NamesNothing(Engine):
    def compile(self, source: GrammarSource) -> CompiledGrammar:
        try:
            return super().compile(source)
        except ValueError as error:
            raise ValueError("this schema cannot be compiled") from error


class WidensRegexes(Engine):
    """Takes a regex for the beginning of an answer."""

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        if source.kind is GrammarKind.REGEX:
            source = GrammarSource(kind=source.kind, text=f"({source.text})z?")
        return super().compile(source)


BROKEN: dict[type[Engine], tuple[str, str]] = {
    engine_of(AddsToTheMask): ("answers", "not of the form|may come"),
    engine_of(EndsAnywhere): ("answers", "an end token may come, and the text is not of the form"),
    engine_of(KnowsOneEnd): ("answers", "one end token may come and the other may not"),
    engine_of(AllowsPadding): ("answers", "which is no text"),
    engine_of(TakesAnything): ("keywords|masks", "is ignored|accept takes it"),
    engine_of(RaisesItsOwn): ("keywords|masks|steps", "KeyError"),
    engine_of(IsOverEarly): ("answers", "is_terminated says"),
    engine_of(ForgetsAByte): ("answers|masks", "no token may come|accept takes it"),
    engine_of(TurnsStepsAround): ("steps", "otherwise than alone"),
    engine_of(SilentInSteps): ("steps", "accept_each"),
    SharesItsMatcher: ("answers|masks|matchers apart", ""),
    DropsKeywords: ("keywords", "'uniqueItems' is ignored"),
    ChecksLess: ("keywords", "compile_for_check does not"),
    NamesNothing: ("keywords", "does not name the keyword"),
    WidensRegexes: ("answers", "not of the form"),
}
