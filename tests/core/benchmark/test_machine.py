"""The ceilings of a machine are measured in a bounded time."""

from __future__ import annotations

import time

import pytest
import torch

from quire.benchmark import machine

CPU = torch.device("cpu")


def test_slow_call_is_not_repeated_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product in float16 takes seconds on a CPU that has none."""
    monkeypatch.setattr(machine, "MOST_SECONDS", 0.05)
    calls = []

    def slow() -> None:
        calls.append(time.sleep(0.03))

    assert machine._seconds(slow, CPU) >= 0.03
    assert len(calls) <= 2


def test_fast_call_is_measured_after_those_that_warm_up() -> None:
    """Ten of them."""
    calls = []

    def fast() -> None:
        calls.append(None)

    assert machine._seconds(fast, CPU) > 0
    assert len(calls) == machine.WARM_UP_ROUNDS + machine.ROUNDS
