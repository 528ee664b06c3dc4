"""Draw cases of one check until one fails or time is over, and make a failure smaller."""

from __future__ import annotations

import contextlib
import random
import time
import unittest
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from attrs import Factory, define, evolve, frozen
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis.errors import NoSuchExample
from hypothesis.strategies import SearchStrategy

from quire.errors import ConfigError
from quire.patience import telling
from quire.testing.kit_report import PROFILES, CheckResult, Failure, Profile, Report

# A case may have kernels compiled.
CASE_PATIENCE_S = 60.0


@frozen(kw_only=True)
class Check:
    """One line of a report.

    `judge(case)` returns None for a case that is right. `share` is the part of the time that it may
    take, `most` how many cases are drawn of one that takes long. `first` are looked at before
    any is drawn. `skipped`: why it is not looked
    at. `guess` looks at the cases that failed, the smallest first, where `judge` cannot guess.
    """

    name: str
    judge: Callable[[Any], Failure | None]
    cases: SearchStrategy[Any]
    share: float
    most: int | None = None
    first: Sequence[Any] = ()
    skipped: str | None = None
    guess: Callable[[Sequence[Any]], str | None] | None = None


@define(kw_only=True)
class _Search:
    """The cases of one check that were looked at, and when to stop looking."""

    check: Check
    profile: Profile
    started: float = Factory(time.perf_counter)
    counts_from: float | None = None
    failed_at: float | None = None
    num_cases: int = 0
    known: dict[Any, Failure] = Factory(dict)

    def fails(self, case: Any) -> bool:
        """Answer whether a case fails; out of time, no new case does."""
        if case in self.known:
            return True
        if self._is_over():
            return False
        self.num_cases += 1
        failure = self._judged(case)
        # The first case also pays for imports and compilers: its time is not the check's share.
        self.counts_from = self.counts_from or time.perf_counter()
        if failure is None:
            return False
        self.failed_at = self.failed_at or time.perf_counter()
        self.known[case] = failure
        return True

    def diagnosed(self, smallest: Any) -> Failure:
        """Return the failure of the smallest case, with a guess."""
        failure = self.known[smallest]
        if failure.guess is not None or self.check.guess is None:
            return failure
        others = [case for case in self.known if case != smallest]
        try:
            some = dict.fromkeys([smallest, *others[:2], *others[-3:]])
            return evolve(failure, guess=self.check.guess(list(some)))
        except (Exception, SystemExit):  # noqa: BLE001 - a plugin that raises again; what failed is known
            return failure

    def _in_words(self, case: Any) -> str:
        return f"check {self.check.name!r}, case: {case},"

    def _is_over(self) -> bool:
        now = time.perf_counter()
        if self.failed_at is not None:
            return now - self.failed_at > self.profile.shrink_s
        return (
            self.counts_from is not None
            and now - self.counts_from > self.check.share * self.profile.seconds
        )

    def _judged(self, case: Any) -> Failure | None:
        try:
            with telling(partial(self._in_words, case), after_s=CASE_PATIENCE_S):
                return self.check.judge(case)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin raises is its failure
            text = " ".join(str(error).split())
            return Failure(what=f"it raises {type(error).__name__}: {text}", case=case)


def run(check: Check, profile: Profile, *, seed: int = 0) -> CheckResult:
    """Draw cases of one check until one fails or time is over, and make a failure smaller."""
    if check.skipped is not None:
        return CheckResult(name=check.name, outcome="skipped", detail=check.skipped)
    search = _Search(check=check, profile=profile)
    wanted = max(profile.least, round(check.share * profile.examples))
    rules = settings(
        max_examples=min(wanted, check.most or wanted),
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    # The smallest case that failed, if any did; a case may be None.
    failed = next(([case] for case in check.first if search.fails(case)), [])
    if failed:
        # What is drawn then has time of its own, and may be smaller.
        search.failed_at = search.counts_from = None
    with contextlib.suppress(NoSuchExample):
        failed = [find(check.cases, search.fails, settings=rules, random=random.Random(seed))]
    outcome = "failed" if failed else "passed"
    detail = str(search.diagnosed(failed[0])) if failed else ""
    return CheckResult(
        name=check.name,
        outcome=outcome,
        cases=search.num_cases,
        seconds=time.perf_counter() - search.started,
        detail=detail,
    )


def check_device(device: str) -> None:
    """Raise ConfigError where PyTorch finds no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no CUDA device here. Use --device cpu.")


class KitTests:
    """What the classes to subclass have in common: where, how much, and one check by its name."""

    device: ClassVar[str] = "cpu"
    profile: ClassVar[Profile] = PROFILES["quick"]
    seed: ClassVar[int] = 0

    def _checks(self) -> list[Check]:
        raise NotImplementedError(type(self).__name__)

    def _check(self, name: str) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise unittest.SkipTest("there is no CUDA device")
        [check] = [check for check in self._checks() if check.name == name]
        result = run(check, self.profile, seed=self.seed)
        if result.outcome == "skipped":
            raise unittest.SkipTest(result.detail)
        assert result.outcome == "passed", f"{name}, seed {self.seed}: {result.detail}"


def run_all(checks: Sequence[Check], profile: Profile, seed: int) -> Iterator[CheckResult]:
    """Yield the result of each check as it ends; all of them share the profile's seconds."""
    shares = sum(check.share for check in checks if check.skipped is None)
    fair = evolve(profile, seconds=profile.seconds / max(1.0, shares))
    for check in checks:
        yield run(check, fair, seed=seed)


def report_of(results: Iterator[CheckResult], report: Report) -> Report:
    """Return the report of the results, to the end or to the first failure."""
    kept: list[CheckResult] = []
    for result in results:
        kept.append(result)
        if result.outcome == "failed":
            break
    return evolve(report, checks=kept)
