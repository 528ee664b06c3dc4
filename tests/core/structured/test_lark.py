"""Lark grammars whose start never ends are refused, others are left to the engine."""

from __future__ import annotations

import pytest

from quire.structured.lark import check_lark


@pytest.mark.parametrize(
    "text",
    [
        'start: "a" start',
        'start: "a" x\nx: "b" x | "c" x',
        'start: x\nx: "(" y ")" -> named\ny: (x | "a" y) // "b"\n',
        'start: X\nX: "a" X',
        'start: ("a" start)+',
        'start: "a"* start "b"?',
    ],
)
def test_grammars_that_never_end_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="never ends"):
        check_lark(text)


@pytest.mark.parametrize(
    "text",
    [
        'start: "a" start | "b"',
        'start: "a" start?',
        'start: "a" [start] "b"',
        'start: ("a" start)* "b"',
        'start: "a" x\n?x: "b" x\n | "c" -> last\n',
        'start: "|" other\nother: /a|(b)/ "\\" start"',
        "start: unknown_rule",
        '%ignore " "\nstart: start',
        "",
    ],
)
def test_grammars_with_an_end_or_with_what_is_not_read_pass(text: str) -> None:
    check_lark(text)
