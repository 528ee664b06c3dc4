"""Prompts that are scored take no prefix-cache hit, and chunks are put together once."""

from __future__ import annotations

import pytest
from attrs import evolve
from builders import Harness, make_harness, make_request

from quire.request import SamplingParams, TokenLogprobs
from quire.scheduling.output import SchedulerOutput, StepResult

PROMPT = list(range(10, 22))


def add(harness: Harness, name: str, **params: object) -> None:
    request = make_request(name, PROMPT)
    harness.scheduler.add_request(
        evolve(request, params=SamplingParams(max_tokens=8, **params))  # type: ignore[arg-type]
    )


def entry(number: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-float(number), rank=1)


def result(output: SchedulerOutput, prompts: dict[int, list[int]]) -> StepResult:
    return StepResult(
        step_id=output.step_id,
        token_ids={sequence_id: [7] for sequence_id in output.samples},
        logprobs={sequence_id: entry(99) for sequence_id in output.samples},
        prompt_logprobs={i: [entry(n) for n in numbers] for i, numbers in prompts.items()},
    )


@pytest.mark.parametrize(("params", "num_cached"), [({}, 8), ({"prompt_logprobs": 0}, 0)])
def test_prompt_that_is_scored_is_computed_from_its_beginning(
    params: dict[str, object], num_cached: int
) -> None:
    harness = make_harness()
    add(harness, "first")
    while harness.scheduler.has_unfinished():
        harness.step()

    add(harness, "second", **params)
    (added,) = harness.schedule().added

    assert added.num_computed_tokens == num_cached


def test_chunks_are_delivered_together_with_the_first_token_and_never_again() -> None:
    harness = make_harness(max_num_batched_tokens=5)
    add(harness, "r", prompt_logprobs=1, logprobs=0)
    updates = []
    for numbers in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11]):
        output = harness.schedule()
        updates.append(harness.scheduler.update(result(output, {0: numbers})))
    updates.append(harness.scheduler.update(result(harness.schedule(), {})))

    assert updates[:2] == [[], []]
    assert updates[2][0].prompt_logprobs == (None, *map(entry, range(1, 12)))
    assert [update.logprobs for (update,) in updates[2:]] == [(entry(99),)] * 2
    assert updates[3][0].prompt_logprobs is None


def test_preempted_prompt_begins_anew_and_keeps_nothing_of_before() -> None:
    harness = make_harness(max_num_batched_tokens=6)
    add(harness, "r", prompt_logprobs=1)
    in_flight = harness.schedule()
    (sequence,) = harness.scheduler._requests["r"]
    harness.scheduler._preempt(sequence)
    harness.scheduler.update(result(in_flight, {0: [50, 51]}))

    harness.scheduler.update(result(harness.schedule(), {0: [1, 2, 3, 4, 5, 6]}))
    (update,) = harness.scheduler.update(result(harness.schedule(), {0: [7, 8, 9, 10, 11]}))

    assert update.prompt_logprobs == (None, *map(entry, range(1, 12)))
