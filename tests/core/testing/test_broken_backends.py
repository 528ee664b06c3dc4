"""The kit catches every broken backend, passes the right one, and says what may be wrong."""

from __future__ import annotations

import time

import broken_kernels
import broken_memory  # noqa: F401 - it adds its own to BROKEN
import broken_plans  # noqa: F401 - and so does this
import pytest
from attrs import evolve
from broken_backends import BROKEN, GUESSES
from broken_caches import QuantizedGather
from broken_latents import FusedLatentGather, LatentGather, LatentsAlone
from gather_attention import GatherAttention

from quire.testing.kit import PROFILES, Report, check_attention

# As many cases on a slow machine as on a fast one.
PATIENT = evolve(PROFILES["quick"], seconds=60, examples=240, shrink_s=0.2)


def failure_of(report: Report) -> str:
    return "\n".join(f"{c.name}: {c.detail}" for c in report.checks if c.outcome == "failed")


def test_right_backend_passes() -> None:
    report = check_attention(GatherAttention, profile=PATIENT)

    assert report.passed, failure_of(report)
    assert {c.name for c in report.checks if c.outcome == "skipped"} == {
        *("batch invariance", "rotate_and_write", "encoder"),
        "graph of any step",
    }


@pytest.mark.parametrize(
    "backend",
    [
        *(QuantizedGather, LatentGather, FusedLatentGather, LatentsAlone),
        *(broken_kernels.AnyStep, broken_kernels.Alibi),
    ],
)
def test_right_backend_with_more_in_it_passes(backend: type[GatherAttention]) -> None:
    report = check_attention(backend, profile=PATIENT)

    assert report.passed, failure_of(report)


def test_there_are_enough_broken_backends() -> None:
    assert len(BROKEN) >= 30


# All of them with `--all`: each takes the time of the checks before the one that catches it.
SOME = [
    pytest.param(name, marks=pytest.mark.slow) if number % 4 and name not in GUESSES else name
    for number, name in enumerate(BROKEN)
]


@pytest.mark.parametrize("name", SOME)
def test_broken_backend_is_caught(name: str) -> None:
    started = time.perf_counter()

    report = check_attention(BROKEN[name], profile=PATIENT)

    print(f"{time.perf_counter() - started:.2f} s\n{failure_of(report)}")
    assert not report.passed
    assert GUESSES.get(name, "") in failure_of(report)
