"""How much the kit looks at, and what it found: the same for every kind of plugin."""

from __future__ import annotations

from typing import Any

from attrs import asdict, frozen

from quire.errors import ConfigError


@frozen(kw_only=True)
class Profile:
    """How much is looked at: cases of all checks, tokens of a sequence, and seconds at most.

    A check has `least` cases or its share. `shrink_s` more seconds are spent on making a failure
    smaller. `small`: heads of at most 64 dimensions, no large matrix, no large vocabulary.
    `large_cases` at most are drawn of those that take long: thousands of keys, many sequences.
    """

    name: str
    seconds: float
    examples: int
    longest: int
    shrink_s: float
    small: bool = False
    least: int = 15
    large_cases: int = 0


PROFILES = {
    "quick": Profile(
        name="quick",
        seconds=3,
        examples=300,
        longest=40,
        shrink_s=0.6,
        small=True,
        large_cases=4,
    ),
    "full": Profile(
        name="full", seconds=60, examples=3000, longest=700, shrink_s=20, large_cases=500
    ),
}


def profile_of(profile: str | Profile) -> Profile:
    """Return a profile by its name. Raises: ConfigError for an unknown one."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise ConfigError(f"profile is {profile!r}; allowed: {', '.join(PROFILES)}.")
    return PROFILES[profile]


@frozen(kw_only=True)
class Failure:
    """A check that failed: what is wrong, the smallest case that was found, and a guess.

    The case tells itself in words.
    """

    what: str
    case: Any
    guess: str | None = None

    def __str__(self) -> str:
        lines = [self.what, f"  case: {self.case}"]
        if self.guess is not None:
            lines.append(f"  guess: {self.guess}")
        return "\n".join(lines)


def _cases(count: int) -> str:
    return "case" if count == 1 else "cases"


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
        count = f"{self.cases:>5} {_cases(self.cases):<5}"
        return f"{self.name:<18} {self.outcome}  {count}  {self.seconds:6.2f} s"


@frozen(kw_only=True)
class Report:
    """All checks of a plugin, and the seed that draws the same cases again."""

    kind: str
    name: str
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
        return f"{self.name}: {verdict} ({where}; {cases} {_cases(cases)} in {seconds:.1f} s)"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return {**asdict(self), "passed": self.passed}
