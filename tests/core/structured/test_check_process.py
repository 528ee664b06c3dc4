"""What a child answers: small schemas are tried the cheap way first, and `compile` says no."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from quire.interfaces.grammar import CompiledGrammar, GrammarMatcher, GrammarSource, GrammarStuck
from quire.structured import check_process
from quire.structured.check_process import BRISK_S, SHORT_WALK_TOKENS, SMALL_CHARS, _answer
from quire.structured.compiler import GrammarCompiler


class Grammar(CompiledGrammar, GrammarMatcher):
    """Any token may come, after a while; so many tokens are taken."""

    now_s: ClassVar[float] = 0.0

    def __init__(self, seconds: float, num_tokens: int) -> None:
        self.seconds, self.num_left = seconds, num_tokens

    def start(self) -> GrammarMatcher:
        return self

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        Grammar.now_s += self.seconds
        mask[:] = -1

    def accept(self, token_id: int) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            raise GrammarStuck("too many tokens")

    def is_terminated(self) -> bool:
        return False


class Compiler:
    """Has a grammar or an error for each of its two ways, and notes which were asked for."""

    def __init__(self, for_check: Any, whole: Any) -> None:
        self.found = {"for check": for_check, "whole": whole}
        self.asked: list[str] = []

    def made(self, way: str) -> CompiledGrammar:
        self.asked.append(way)
        if isinstance(self.found[way], Exception):
            raise self.found[way]
        return cast(CompiledGrammar, self.found[way])

    def compile_for_check(self, source: GrammarSource) -> CompiledGrammar:
        return self.made("for check")

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        return self.made("whole")


def brisk() -> Grammar:
    return Grammar(0, SHORT_WALK_TOKENS)


def slow(num_tokens: int = 64) -> Grammar:
    return Grammar(2 * BRISK_S / SHORT_WALK_TOKENS, num_tokens)


SMALL = {"kind": "json", "text": "{}"}
BOTH = ["for check", "whole"]


@pytest.mark.parametrize(
    ("asked", "for_check", "whole", "ways", "answer"),
    [
        (SMALL, brisk(), ValueError("no"), ["for check"], ""),
        (SMALL, ValueError("maybe"), brisk(), BOTH, ""),
        (SMALL, ValueError("maybe"), ValueError("no"), BOTH, "no"),
        (SMALL, Grammar(0, 3), ValueError("no"), BOTH, "no"),
        (SMALL, slow(), brisk(), BOTH, ""),
        (SMALL, slow(), slow(60), BOTH, "too many tokens"),
        (SMALL, slow(), slow(64), BOTH, ""),
        ({"kind": "regex", "text": "a"}, brisk(), ValueError("no"), ["whole"], "no"),
        ({"kind": "json", "text": " " * (SMALL_CHARS + 1)}, slow(), brisk(), ["whole"], ""),
    ],
)
def test_what_is_not_honoured_at_once_is_compiled_whole(
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, str],
    for_check: Any,
    whole: Any,
    ways: list[str],
    answer: str,
) -> None:
    monkeypatch.setattr(check_process.time, "monotonic", lambda: Grammar.now_s)
    compiler = Compiler(for_check, whole)

    assert _answer(cast(GrammarCompiler, compiler), asked, 320) == answer
    assert compiler.asked == ways
