"""The kit's doors to tool-call and reasoning parsers: functions, classes to subclass in pytest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

from hypothesis import strategies as st

from quire.interfaces.answer_parsing import ReasoningParser, ToolCallParser
from quire.testing import parser_checks as checks
from quire.testing import search
from quire.testing.kit_report import CheckResult, Failure, Profile, Report, profile_of
from quire.testing.parser_checks import AnyParser, ParserCase

__all__ = [
    "ReasoningParserTests",
    "ToolCallParserTests",
    "check_parser",
    "iter_parser",
]

SNIPPETS = (
    *('{"name": "add", "arguments": {"x": 1}}', '{"name": "ad', "add", "add(x=1)", "[add("),
    *("nobody", "null", " ", "\n", "ä€😀", "[", "]", "{", "}", ":", ",", '"', "\\", "\\u12"),
    *("(", ")", "'", ";", "1e", "-", "```", "<", "</", "|>", "a"),
)
PROMPTS = ("", "Hi.", "<think>\n", "x <think>", "<think>a</think>\n\n")
# Nothing that a mark could begin with, which text around calls must not have.
PLAIN = st.text(st.characters(categories=("L", "Nd", "Zs")), max_size=8)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**6), 10**6),
        st.sampled_from(["", "a b", 'quo"te', "\\", "}}", "]", "é😀", "\n", "add"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["a", "b c"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["x", "y_", "city"]), VALUES, max_size=2)


def _marks(kind: type[AnyParser]) -> list[str]:
    """Return what a parser's own form is written with, and beginnings of it."""
    found: list[str] = []
    if issubclass(kind, ToolCallParser):
        form = kind.call_form
        if form is not None:
            found += [form.before_name, form.after_name, form.separator, form.opening, form.closing]
            found += [*form.ends, form.trigger or "", *form.excludes]
    else:
        forms = [kind.thoughts_form(prompt) for prompt in PROMPTS]
        found += [mark for form in forms if form for mark in (form.begin, form.end)]
    marks = sorted({mark for mark in found if mark})
    return [*marks, *(mark[: max(1, len(mark) // 2)] for mark in marks)]


def _calls_of(kind: type[AnyParser]) -> list[str]:
    """Return calls as a form writes them, whose arguments may be no object."""
    form = kind.call_form if issubclass(kind, ToolCallParser) else None
    if form is None:
        return []
    values = ('{"x": 1}', "{}", "[1]", '"a"', "1", '{"x": NaN}', '{"x": 1')
    return [checks.written(form, [("add", value)], 0) for value in values]


@st.composite
def answers(draw: st.DrawFn, kind: type[AnyParser]) -> ParserCase:
    """Draw an answer that may be broken anywhere."""
    snippets = [*_marks(kind) * 2, *_calls_of(kind) * 2, *SNIPPETS]
    parts = st.lists(st.sampled_from(snippets) | st.text(max_size=2), max_size=8)
    return ParserCase(
        answer="".join(draw(parts)).encode(errors="ignore").decode(),
        prompt=draw(st.sampled_from(PROMPTS)),
    )


@st.composite
def called(draw: st.DrawFn, kind: type[ToolCallParser]) -> ParserCase:
    """Draw calls, and text around them where a form may have it."""
    call = st.tuples(st.sampled_from(checks.TOOLS), ARGUMENTS.map(json.dumps))
    form = kind.call_form
    is_marked = form is not None and form.trigger is not None
    return ParserCase(
        answer="",
        calls=tuple(draw(st.lists(call, min_size=1, max_size=3))),
        before=draw(PLAIN) if is_marked else "",
        seed=draw(st.integers(0, 3)),
    )


def _thoughts() -> st.SearchStrategy[ParserCase]:
    text = PLAIN | st.sampled_from(["a\n\nb", " ", "1 < 2", "{}", "</"])
    return st.builds(
        ParserCase,
        answer=st.just(""),
        prompt=st.sampled_from(PROMPTS),
        before=text,
        after=text,
    )


def _checks(kind: type[AnyParser]) -> list[search.Check]:
    def check(
        name: str,
        judge: Callable[[Any, ParserCase], Failure | None],
        cases: st.SearchStrategy[ParserCase],
        share: float,
        skipped: str | None = None,
    ) -> search.Check:
        own = partial(judge, kind)
        return search.Check(name=name, judge=own, cases=cases, share=share, skipped=skipped)

    common = [
        check("cuts", checks.check_cuts, answers(kind), 0.4),
        check("answers apart", checks.check_apart, answers(kind), 0.1),
    ]
    if not issubclass(kind, ToolCallParser):
        return [*common, check("thoughts", checks.check_thoughts, _thoughts(), 0.4)]
    without = None if kind.call_form is not None else "the parser declares no call_form"
    return [
        *common,
        check("pieces", checks.check_pieces, answers(kind), 0.2),
        check("calls", checks.check_calls, called(kind), 0.2, without),
        check("offer", checks.check_offer, called(kind), 0.1, without),
    ]


def iter_parser(
    parser: type[AnyParser], *, profile: str | Profile = "quick", seed: int = 0
) -> Iterator[CheckResult]:
    """Yield the result of each check of a tool-call or reasoning parser as it ends.

    Raises: ConfigError for an unknown profile.
    """
    chosen = profile_of(profile)
    yield from search.run_all(_checks(parser), chosen, seed)


def check_parser(
    parser: type[AnyParser], *, profile: str | Profile = "quick", seed: int = 0
) -> Report:
    """Check a tool-call or reasoning parser and return the report, to the first failure.

    Raises: ConfigError for an unknown profile.
    """
    report = Report(
        kind="tool-call-parser" if issubclass(parser, ToolCallParser) else "reasoning-parser",
        name=parser.__name__,
        profile=profile_of(profile).name,
        device="cpu",
        seed=seed,
        checks=[],
    )
    return search.report_of(iter_parser(parser, profile=profile, seed=seed), report)


class ToolCallParserTests(search.KitTests):
    """Subclass this in a test file, name the parser, and pytest runs every check."""

    parser: ClassVar[type[ToolCallParser]]

    def _checks(self) -> list[search.Check]:
        return _checks(self.parser)

    def test_cut_of_an_answer_changes_nothing(self) -> None:
        """At every place."""
        self._check("cuts")

    def test_answers_at_the_same_time_are_apart(self) -> None:
        """Nothing is remembered beside a parser."""
        self._check("answers apart")

    def test_what_is_no_call_stays_content(self) -> None:
        """And whole calls have an object as arguments."""
        self._check("pieces")

    def test_calls_of_the_form_are_read(self) -> None:
        """Where `call_form` is declared."""
        self._check("calls")

    def test_functions_that_are_not_on_offer_are_not_called(self) -> None:
        """Where `call_form` is declared."""
        self._check("offer")


class ReasoningParserTests(search.KitTests):
    """Subclass this in a test file, name the parser, and pytest runs every check."""

    parser: ClassVar[type[ReasoningParser]]

    def _checks(self) -> list[search.Check]:
        return _checks(self.parser)

    def test_cut_of_an_answer_changes_nothing(self) -> None:
        """At every place."""
        self._check("cuts")

    def test_answers_at_the_same_time_are_apart(self) -> None:
        """Nothing is remembered beside a parser."""
        self._check("answers apart")

    def test_thoughts_are_told_from_what_follows(self) -> None:
        """As `thoughts_form` says they are written."""
        self._check("thoughts")
