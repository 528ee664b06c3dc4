"""The kit's doors to logits processors: a function, a class to subclass in pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

from attrs import evolve
from hypothesis import strategies as st
from torch import Tensor

from quire.errors import RequestError
from quire.interfaces.sampling import LogitsProcessor
from quire.request import SamplingParams
from quire.testing import processor_checks as checks
from quire.testing import search
from quire.testing.kit_report import CheckResult, Failure, Profile, Report, profile_of
from quire.testing.processor_checks import (
    ProcessorCase,
    ProcessorRow,
    ProcessorSubject,
)

__all__ = ["LogitsProcessorTests", "ProcessorSubject", "check_processor", "iter_processor"]

# What a processor that nobody tells of is tried with: what it does not refuse is drawn.
GUESSES: tuple[Any, ...] = (True, 1, 0.5, "a", [1, 2], {"1": 0.5}, {})
VOCAB_SIZES = [12, 1, 5, 1000]
DTYPES = ["float32", "bfloat16", "float16"]


@st.composite
def processor_cases(draw: st.DrawFn, num_arguments: int, *, least: int = 0) -> ProcessorCase:
    """Draw a batch."""
    asks = st.one_of(st.none(), st.integers(0, num_arguments - 1)) if num_arguments else st.none()
    row = st.builds(
        ProcessorRow,
        asks=asks,
        num_prompt=st.integers(1, 8),
        num_output=st.integers(0, 8),
    )
    return ProcessorCase(
        rows=tuple(draw(st.lists(row, min_size=least, max_size=5))),
        vocab_size=draw(st.sampled_from(VOCAB_SIZES)),
        dtype=draw(st.sampled_from(DTYPES)),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def guessed_arguments(processor: type[LogitsProcessor]) -> tuple[Any, ...]:
    """Return arguments that a processor does not refuse."""
    found = []
    for value in GUESSES:
        params = SamplingParams(extra_args={processor.name: value})
        try:
            processor.check_arguments(value, params)
            processor(12, checks.MAX_NUM_SEQS, "cpu").add_row(0, value, params)
        except (RequestError, TypeError, ValueError, AttributeError, LookupError):
            continue
        found.append(value)
    return tuple(found)


def _checks(subject: ProcessorSubject) -> list[search.Check]:
    count = len(subject.arguments)
    some, several = processor_cases(count), processor_cases(count, least=2)

    def check(
        name: str,
        judge: Callable[[ProcessorSubject, ProcessorCase], Failure | None],
        cases: st.SearchStrategy[ProcessorCase],
        share: float,
    ) -> search.Check:
        return search.Check(name=name, judge=partial(judge, subject), cases=cases, share=share)

    return [
        check("rows", checks.check_rows, some, 0.4),
        check("alone", checks.check_alone, some, 0.2),
        check("rows apart", checks.check_rows_apart, several, 0.1),
        check("forgets", checks.check_forgets, some, 0.1),
        check("arguments", checks.check_arguments, st.just(ProcessorCase(rows=())), 0.02),
    ]


def iter_processor(
    subject: ProcessorSubject, *, profile: str | Profile = "quick", seed: int = 0
) -> Iterator[CheckResult]:
    """Yield the result of each check of a processor as it ends.

    Raises: ConfigError for an unknown profile.
    """
    chosen = profile_of(profile)
    yield from search.run_all(_checks(subject), chosen, seed)


def check_processor(
    subject: ProcessorSubject, *, profile: str | Profile = "quick", seed: int = 0
) -> Report:
    """Check a processor and return the report, to the end or to the first failure.

    Raises: ConfigError for an unknown profile.
    """
    report = Report(
        kind="logits-processor",
        name=subject.processor.__name__,
        profile=profile_of(profile).name,
        device=subject.device,
        seed=seed,
        checks=[],
    )
    return search.report_of(iter_processor(subject, profile=profile, seed=seed), report)


class LogitsProcessorTests(search.KitTests):
    """Subclass this in a test file, name the processor, and pytest runs every check.

    `arguments` are what requests may give it, `bad_arguments` what it must refuse.
    """

    processor: ClassVar[type[LogitsProcessor]]
    arguments: ClassVar[Sequence[Any]]
    bad_arguments: ClassVar[Sequence[Any]] = ()

    def expected(
        self, logits: Tensor, tokens: list[int], num_prompt_tokens: int, arguments: Any
    ) -> Tensor | None:
        """Return the float64 logits [vocab_size] of a row after the processor; None: no formula."""
        return None

    def _checks(self) -> list[search.Check]:
        subject = ProcessorSubject(
            processor=self.processor,
            arguments=self.arguments,
            bad_arguments=self.bad_arguments,
            device=self.device,
        )
        return _checks(evolve(subject, expected=self.expected))

    def test_rows_have_what_they_ask_for_and_no_other_is_changed(self) -> None:
        """Bit by bit, where a row asks for nothing."""
        self._check("rows")

    def test_row_is_the_same_alone_and_in_a_batch(self) -> None:
        """And under another persistent number."""
        self._check("alone")

    def test_nan_in_one_row_does_not_reach_the_others(self) -> None:
        """In one batch."""
        self._check("rows apart")

    def test_row_that_was_removed_leaves_nothing(self) -> None:
        """To the next one of its number."""
        self._check("forgets")

    def test_wrong_arguments_are_refused(self) -> None:
        """And right ones are not."""
        self._check("arguments")
