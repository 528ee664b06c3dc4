"""The conformance kit's two doors: a function for the command, a class to subclass in pytest."""

from __future__ import annotations

import random
import time
import unittest
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from attrs import Factory, asdict, define, evolve, frozen
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis.errors import NoSuchExample

from quire.errors import ConfigError
from quire.interfaces.attention import AttentionBackend, AttentionSpec
from quire.testing.attention_cases import Case
from quire.testing.attention_checks import CHECKS, Check
from quire.testing.attention_run import Subject
from quire.testing.attention_strategies import Choices, cases, choices_of, given_specs, specs
from quire.testing.diagnosis import Failure


@frozen(kw_only=True)
class Profile:
    """How much is looked at: cases of all checks, tokens of a sequence, and seconds at most.

    A check has `least` cases or its share. `shrink_s` more seconds are spent on making a failure
    smaller. `small`: heads of at most 64 dimensions.
    """

    name: str
    seconds: float
    examples: int
    longest: int
    shrink_s: float
    small: bool = False
    least: int = 15


PROFILES = {
    "quick": Profile(name="quick", seconds=3, examples=300, longest=40, shrink_s=0.6, small=True),
    "full": Profile(name="full", seconds=60, examples=3000, longest=700, shrink_s=20),
}


@frozen(kw_only=True)
class CheckResult:
    """What became of one check: `passed`, `failed` or `skipped`, with the reason or diagnosis."""

    name: str
    outcome: str
    cases: int = 0
    seconds: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        if self.outcome == "skipped":
            return f"{self.name:<18} skipped: {self.detail}"
        return f"{self.name:<18} {self.outcome}  {self.cases:>5} cases  {self.seconds:6.2f} s"


@frozen(kw_only=True)
class Report:
    """All checks of a backend, and the seed that draws the same cases again."""

    backend: str
    profile: str
    device: str
    seed: int
    checks: list[CheckResult]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.outcome != "failed" for check in self.checks)

    def summary(self) -> str:
        """Return the last line of a report."""
        failed = [check.name for check in self.checks if check.outcome == "failed"]
        cases = sum(check.cases for check in self.checks)
        seconds = sum(check.seconds for check in self.checks)
        verdict = f"failed: {', '.join(failed)}" if failed else "passed"
        where = f"{self.profile} on {self.device}, seed {self.seed}"
        return f"{self.backend}: {verdict} ({where}; {cases} cases in {seconds:.1f} s)"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return {**asdict(self), "passed": self.passed}


@define(kw_only=True)
class _Search:
    """The cases of one check that were looked at, and when to stop looking."""

    check: Check
    subject: Subject
    profile: Profile
    started: float = Factory(time.perf_counter)
    failed_at: float | None = None
    num_cases: int = 0
    known: dict[Case, Failure] = Factory(dict)

    def fails(self, case: Case) -> bool:
        """Answer whether a case fails; out of time, no new case does."""
        if case in self.known:
            return True
        if self._is_over():
            return False
        self.num_cases += 1
        failure = self._judged(case)
        if failure is None:
            return False
        self.failed_at = self.failed_at or time.perf_counter()
        self.known[case] = failure
        return True

    def diagnosed(self, smallest: Case) -> Failure:
        """Return the failure of the smallest case, with a guess."""
        failure = self.known[smallest]
        if failure.guess is not None or self.check.guess is None:
            return failure
        others = [case for case in self.known if case != smallest]
        return evolve(failure, guess=self.check.guess(self.subject, [smallest, *others[:5]]))

    def _is_over(self) -> bool:
        now = time.perf_counter()
        if self.failed_at is not None:
            return now - self.failed_at > self.profile.shrink_s
        return now - self.started > self.check.share * self.profile.seconds

    def _judged(self, case: Case) -> Failure | None:
        try:
            return self.check.judge(self.subject, case)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is its failure
            text = " ".join(str(error).split())
            return Failure(what=f"it raises {type(error).__name__}: {text}", case=case)


def run_check(
    check: Check,
    choices: Choices,
    profile: Profile,
    *,
    seed: int = 0,
    only: Sequence[AttentionSpec] = (),
) -> CheckResult:
    """Draw cases of one check until one fails or time is over, and make a failure smaller."""
    reason = check.why_skipped(choices)
    if reason is not None:
        return CheckResult(name=check.name, outcome="skipped", detail=reason)
    subject = Subject(backend=choices.backend, options=choices.options)
    search = _Search(check=check, subject=subject, profile=profile)
    drawn = given_specs(only) if only else specs(choices, profile.small)
    rules = settings(
        max_examples=max(profile.least, round(check.share * profile.examples)),
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    outcome, detail = "passed", ""
    strategy = cases(drawn, profile.longest, single=check.single)
    try:
        smallest = find(strategy, search.fails, settings=rules, random=random.Random(seed))
        outcome, detail = "failed", str(search.diagnosed(smallest))
    except NoSuchExample:
        pass
    return CheckResult(
        name=check.name,
        outcome=outcome,
        cases=search.num_cases,
        seconds=time.perf_counter() - search.started,
        detail=detail,
    )


def iter_attention(
    backend: type[AttentionBackend],
    *,
    profile: str | Profile = "quick",
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    specs: Sequence[AttentionSpec] = (),
    seed: int = 0,
) -> Iterator[CheckResult]:
    """Yield the result of each check of a backend as it ends; `specs` restricts the cases.

    Raises: ConfigError for an unknown profile, or a backend that serves nothing on the device.
    """
    chosen = _profile(profile)
    choices = _choices(Subject(backend=backend, options=options or {}), device, specs)
    for check in CHECKS:
        yield run_check(check, choices, chosen, seed=seed, only=specs)


def _profile(profile: str | Profile) -> Profile:
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise ConfigError(f"profile is {profile!r}; allowed: {', '.join(PROFILES)}.")
    return PROFILES[profile]


def check_device(device: str) -> None:
    """Raise ConfigError where PyTorch finds no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no CUDA device here. Use --device cpu.")


def _choices(subject: Subject, device: str, only: Sequence[AttentionSpec] = ()) -> Choices:
    """Return what is drawn from: the given specifications, or what the backend says."""
    if only:
        backend, options = subject.backend, subject.options
        return Choices(backend=backend, options=options, plain=only[0], changes={})
    choices = choices_of(subject, device)
    if isinstance(choices, str):
        raise ConfigError(
            f"{subject.backend.__name__} serves nothing that the kit asks for on {device}: "
            f"{choices}. Give `specs` that it serves, or another device."
        )
    return choices


def check_attention(
    backend: type[AttentionBackend],
    *,
    profile: str | Profile = "quick",
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    specs: Sequence[AttentionSpec] = (),
    seed: int = 0,
) -> Report:
    """Check a backend and return the report, to the end or to the first failure.

    Raises: ConfigError for an unknown profile, or a backend that serves nothing on the device.
    """
    results: list[CheckResult] = []
    for result in iter_attention(
        backend, profile=profile, device=device, options=options, specs=specs, seed=seed
    ):
        results.append(result)
        if result.outcome == "failed":
            break
    return Report(
        backend=backend.__name__,
        profile=_profile(profile).name,
        device=device,
        seed=seed,
        checks=results,
    )


class AttentionBackendTests:
    """Subclass this in a test file, name the backend, and pytest runs every check.

    `specs` restricts the cases to some specifications; without it the backend's own
    `why_unsupported` says what is drawn.
    """

    backend: ClassVar[type[AttentionBackend]]
    options: ClassVar[Mapping[str, Any]] = {}
    specs: ClassVar[Sequence[AttentionSpec]] = ()
    device: ClassVar[str] = "cpu"
    profile: ClassVar[Profile] = PROFILES["quick"]
    seed: ClassVar[int] = 0

    def _check(self, name: str) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise unittest.SkipTest("there is no CUDA device")
        [check] = [check for check in CHECKS if check.name == name]
        subject = Subject(backend=self.backend, options=self.options)
        choices = _choices(subject, self.device, self.specs)
        result = run_check(check, choices, self.profile, seed=self.seed, only=self.specs)
        if result.outcome == "skipped":
            raise unittest.SkipTest(result.detail)
        assert result.outcome == "passed", f"{name}, seed {self.seed}: {result.detail}"

    def test_output_is_within_the_bound_and_hidden_memory_is_not_read(self) -> None:
        """Against float64, on poisoned memory."""
        self._check("output")

    def test_blocks_of_others_are_not_changed(self) -> None:
        """But for block 0."""
        self._check("blocks")

    def test_each_slot_has_memory_of_its_own(self) -> None:
        """In its own block."""
        self._check("slots")

    def test_plans_and_layers_are_apart(self) -> None:
        """Two steps in flight, two layers each."""
        self._check("plans apart")

    def test_nan_in_one_sequence_does_not_reach_the_others(self) -> None:
        """In one batch."""
        self._check("rows apart")

    def test_lse_is_the_log_sum_exp_of_the_scores(self) -> None:
        """Where the backend offers it."""
        self._check("log-sum-exp")

    def test_bits_are_the_same_alone_and_in_a_batch(self) -> None:
        """Where `batch_invariant` is declared."""
        self._check("batch invariance")

    def test_graph_serves_other_lengths_than_it_was_captured_with(self) -> None:
        """Where `graph_support` says so."""
        self._check("graph replay")

    def test_fused_write_equals_its_steps(self) -> None:
        """Where `rotate_and_write` is offered."""
        self._check("rotate_and_write")

    def test_encoder_sees_all_keys_without_a_cache(self) -> None:
        """Where bidirectional attention is served."""
        self._check("encoder")
