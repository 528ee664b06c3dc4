"""The kit's doors to grammar engines: a function, a class to subclass in pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

from hypothesis import strategies as st

from quire.interfaces.grammar import GrammarEngine
from quire.testing import grammar_checks as checks
from quire.testing import search
from quire.testing.grammar_cases import KEYWORDS, cases
from quire.testing.grammar_checks import GrammarSubject
from quire.testing.kit_report import CheckResult, Failure, Profile, Report, profile_of

__all__ = ["GrammarEngineTests", "GrammarSubject", "check_grammar", "iter_grammar"]


def _checks(subject: GrammarSubject) -> list[search.Check]:
    def check(
        name: str,
        judge: Callable[[GrammarSubject, Any], Failure | None],
        drawn: st.SearchStrategy[Any],
        share: float,
    ) -> search.Check:
        return search.Check(name=name, judge=partial(judge, subject), cases=drawn, share=share)

    def each_keyword(subject: GrammarSubject, _: None) -> Failure | None:
        found = (checks.check_keyword(subject, keyword) for keyword in KEYWORDS)
        return next((failure for failure in found if failure is not None), None)

    return [
        check("keywords", each_keyword, st.none(), 0.02),
        check("answers", checks.check_answers, cases(), 0.3),
        check("masks", checks.check_masks, cases(), 0.2),
        check("vocabularies", checks.check_vocabularies, cases(parts=True), 0.2),
        check("matchers apart", checks.check_apart, cases(), 0.15),
        check("steps", checks.check_steps, cases(), 0.13),
    ]


def iter_grammar(
    subject: GrammarSubject, *, profile: str | Profile = "quick", seed: int = 0
) -> Iterator[CheckResult]:
    """Yield the result of each check of an engine as it ends.

    Raises: ConfigError for an unknown profile.
    """
    chosen = profile_of(profile)
    yield from search.run_all(_checks(subject), chosen, seed)


def check_grammar(
    engine: type[GrammarEngine], *, profile: str | Profile = "quick", seed: int = 0
) -> Report:
    """Check an engine and return the report, to the end or to the first failure.

    Raises: ConfigError for an unknown profile.
    """
    report = Report(
        kind="grammar",
        name=engine.__name__,
        profile=profile_of(profile).name,
        device="cpu",
        seed=seed,
        checks=[],
    )
    subject = GrammarSubject(engine)
    return search.report_of(iter_grammar(subject, profile=profile, seed=seed), report)


class GrammarEngineTests(search.KitTests):
    """Subclass this in a test file, name the engine, and pytest runs every check."""

    engine: ClassVar[type[GrammarEngine]]

    def _checks(self) -> list[search.Check]:
        return _checks(GrammarSubject(self.engine))

    def test_keywords_are_enforced_or_refused_by_name(self) -> None:
        """Those of JSON Schema 2020-12."""
        self._check("keywords")

    def test_answers_end_where_they_are_of_the_form(self) -> None:
        """And nowhere else, by each end token."""
        self._check("answers")

    def test_masks_have_the_tokens_that_are_accepted(self) -> None:
        """And none that is no text."""
        self._check("masks")

    def test_longer_tokens_allow_the_texts_that_bytes_allow(self) -> None:
        """Whatever was in the mask."""
        self._check("vocabularies")

    def test_matchers_of_a_grammar_are_apart(self) -> None:
        """Each stands where its own tokens lead."""
        self._check("matchers apart")

    def test_a_step_at_once_is_that_of_each_matcher(self) -> None:
        """Masks and tokens."""
        self._check("steps")
