"""Seeded runs of the whole scheduler; `simulation.py --seeds 10000` runs more."""

from __future__ import annotations

from collections import Counter

import pytest
from attrs import evolve
from fake_runner import FakeRunner
from scenario import draw_scenario, shrink
from simulation import Simulation, run_seeds

from quire.scheduling.output import SchedulerOutput

SEEDS = 1500
SITUATIONS = (
    "abort: chunk",
    "abort: decode",
    "abort: in flight",
    "abort: last step",
    "abort: preempted",
    "abort: waiting",
    "abort: waiting to fork",
    "cache hit",
    "copy",
    "ended: error",
    "ended: length",
    "ended: stop",
    "ended: stop string",
    "fork",
    "hit on resume",
    "mixed step",
    "no fork",
    "preemption",
    "preemption without need",
    "refused",
    "resumption",
)


@pytest.fixture(scope="module")
def seen() -> Counter[str]:
    return run_seeds(range(SEEDS))


def test_scheduler_keeps_its_properties_in_random_runs(seen: Counter[str]) -> None:
    assert seen["ended: length"] > SEEDS


@pytest.mark.parametrize("situation", SITUATIONS)
def test_simulation_comes_through_situation(situation: str, seen: Counter[str]) -> None:
    assert seen[situation] >= 10


def test_simulation_gives_the_same_steps_for_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[SchedulerOutput] = []
    dispatch = FakeRunner.dispatch

    def record(self: FakeRunner, output: SchedulerOutput) -> None:
        outputs.append(output)
        dispatch(self, output)

    monkeypatch.setattr(FakeRunner, "dispatch", record)

    run_seeds(range(50))
    first = outputs.copy()
    outputs.clear()
    run_seeds(range(50))

    assert outputs == first


def test_story_shrinks_to_what_still_fails() -> None:
    scenario = evolve(draw_scenario(12), policy="fcfs")

    smallest = shrink(scenario, lambda story: any(a.n > 1 for a in story.arrivals))

    assert [a.n for a in smallest.arrivals] == [2]
    assert [len(a.prompt) for a in smallest.arrivals] == [1]
    assert len(smallest.lines()) == 2


def test_run_of_a_story_ends_with_nothing_left() -> None:
    simulation = Simulation(draw_scenario(3))

    simulation.run()

    assert simulation.scheduler.has_unfinished() is False
    assert simulation.runner.in_flight == type(simulation.runner.in_flight)()
