"""The proofs can fail: each planted mistake is caught."""

from __future__ import annotations

import pytest
from hypothesis import Phase
from planted_bugs import BLOCK_BUGS, MACHINE_BUGS, SCHEDULER_BUGS, Bug
from scenario import draw_scenario
from simulation import why_it_fails
from test_block_manager_machine import run_machine


def _name(bug: Bug) -> str:
    return bug.__name__


@pytest.mark.parametrize("bug", BLOCK_BUGS + SCHEDULER_BUGS, ids=_name)
def test_simulation_catches_planted_bug(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)

    caught = any(why_it_fails(draw_scenario(seed)) for seed in range(1500))

    assert caught


@pytest.mark.parametrize("bug", MACHINE_BUGS, ids=_name)
def test_machine_catches_planted_bug(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)

    assert _machine_fails()


def _machine_fails() -> bool:
    try:
        run_machine(max_examples=300, phases=[Phase.generate])
    except Exception:  # noqa: BLE001  an assertion, or a group of several, or what it broke
        return True
    return False
