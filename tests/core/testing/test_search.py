"""What a check looks at before it says that a plugin passed."""

from __future__ import annotations

import sys
import time
from typing import Any

from attrs import evolve
from hypothesis import strategies as st

from quire.testing.kit_report import Failure, Profile
from quire.testing.search import Check, run, run_all

SHORT = Profile(name="short", seconds=0.1, examples=20, longest=9, shrink_s=0.1)


def test_first_case_does_not_take_the_time_of_the_others() -> None:
    """It pays for imports and compilers: a check of one case would pass what is wrong."""
    seen: list[int] = []

    def judge(case: int) -> Failure | None:
        if not seen:
            time.sleep(0.3)
        seen.append(case)
        return Failure(what="wrong", case=case) if len(seen) > 3 else None

    check = Check(name="output", judge=judge, cases=st.integers(0, 10**6), share=1.0)
    assert run(check, SHORT).outcome == "failed"


def test_time_is_over_for_cases_that_are_all_slow() -> None:
    """The profile's seconds bound a check."""

    def judge(case: Any) -> Failure | None:
        time.sleep(0.06)
        return None

    check = Check(name="output", judge=judge, cases=st.integers(0, 10**6), share=1.0)
    result = run(check, SHORT)
    assert result.outcome == "passed"
    assert result.cases <= 4


def test_plugin_that_exits_has_failed() -> None:
    """The kit would end without a word, with the plugin's own status."""

    def judge(case: Any) -> Failure | None:
        sys.exit(0)

    check = Check(name="output", judge=judge, cases=st.integers(0, 9), share=1.0)
    result = run(check, SHORT)
    assert (result.outcome, "raises SystemExit: 0" in result.detail) == ("failed", True)


def test_checks_share_the_seconds_of_the_profile() -> None:
    """Each may take half of it, and there are four."""
    slow = Check(name="slow", judge=lambda _: time.sleep(0.01), cases=st.integers(), share=0.5)
    profile = evolve(SHORT, seconds=0.4, examples=1000)

    alone, *together = run(slow, evolve(profile, seconds=10)), *run_all([slow] * 4, profile, 0)

    assert [result.outcome for result in together] == ["passed"] * 4
    # A tenth of a second each, a hundredth a case, and the first one is not counted.
    assert all(result.cases <= 13 for result in together)
    assert alone.cases > 13
