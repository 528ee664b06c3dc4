"""Runs the scheduler with a fake model, a fake clock and a seed, and checks six properties.

    python tests/core/scheduling/simulation.py --seeds 10000 [--first 0]

P1 every sequence gets the tokens it would get alone. P2 something happens within a bounded
number of turns. P3 what can never fit is refused at once. P4 budgets hold and the best standing
is served first. P5 what ends gives its blocks back within the steps in flight. P6 no sequence is
preempted again before it has a token. A failure prints its seed and its shrunk story.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from fake_runner import FakeRunner, generate_alone
from invariants import check_nothing_is_left, check_scheduler
from scenario import Arrival, Scenario, draw_scenario, shrink

from quire.config import SchedulerOptions
from quire.errors import RequestError
from quire.request import FinishReason, Request, SamplingParams, SequenceUpdate
from quire.scheduling.block_manager import BlockManager
from quire.scheduling.output import AddedSequence, SchedulerOutput
from quire.scheduling.scheduler import Scheduler
from quire.scheduling.sequence import Sequence

TURN_S = 0.125
Key = tuple[str, int]  # request id, index


class Simulation:
    """One run of one story."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now_s = 0.0
        self.turn = 0
        self.seen: Counter[str] = Counter()  # which situations came up, to know what is proved
        self.requests: dict[str, Request] = {}
        self.arrivals = {arrival.name: arrival for arrival in scenario.arrivals}
        self.arrived_s: dict[str, float] = {}
        self.tokens: dict[Key, list[int]] = {}
        self.ended: dict[Key, FinishReason] = {}
        self.tokens_at_resume: dict[int, int] = {}
        self.idle_turns = 0
        self.rng = random.Random(scenario.seed)
        groups = scenario.groups()
        options = SchedulerOptions(
            max_num_seqs=scenario.max_num_seqs,
            max_num_batched_tokens=scenario.max_num_batched_tokens,
            scheduling_policy=scenario.policy,
            priority_aging_s=scenario.aging_s,
        )
        manager = BlockManager(
            groups,
            enable_prefix_caching=scenario.prefix_caching,
            max_step_tokens=scenario.max_num_batched_tokens,
        )
        self.scheduler = Scheduler(options, manager, scenario.max_model_len, lambda: self.now_s)
        self.runner = FakeRunner(
            groups, self.requests, max_num_seqs=scenario.max_num_seqs, fails=self._why_row_fails
        )

    def run(self) -> None:
        """Play the story to its end. Raises whatever shows that a property does not hold."""
        pending = sorted(self.scenario.arrivals, key=lambda arrival: arrival.turn)
        while pending or self.scheduler.has_unfinished() or self.runner.in_flight:
            while pending and pending[0].turn <= self.turn:
                self._arrive(pending.pop(0))
            self._disturb()
            self._take_turn()
            check_scheduler(self.scheduler, self.scenario.max_num_seqs)
            self.turn += 1
            self.now_s += TURN_S
        check_nothing_is_left(self.scheduler)
        for key in self.tokens:
            self._check_answer(key)

    def _arrive(self, arrival: Arrival) -> None:
        scenario = self.scenario
        params = SamplingParams(
            n=arrival.n, max_tokens=arrival.max_tokens, min_tokens=arrival.min_tokens
        )
        request = Request(
            request_id=arrival.name,
            prompt_token_ids=arrival.prompt,
            params=params,
            max_tokens=arrival.max_tokens,
            seed=0,
            stop_token_ids=arrival.stop_token_ids,
            priority=arrival.priority,
            arrival_s=self.now_s,
            cache_salt=arrival.salt,
        )
        longest = min(len(arrival.prompt) + arrival.max_tokens, scenario.max_model_len)
        fits = len(arrival.prompt) < scenario.max_model_len and scenario.fits(longest)
        try:
            self.scheduler.add_request(request)
        except RequestError:
            assert not fits, f"P3: {arrival.name} is refused and fits"
            self.seen["refused"] += 1
            return
        assert fits, f"P3: {arrival.name} is taken and can never fit"
        self.requests[arrival.name] = request
        self.arrived_s[arrival.name] = self.now_s
        self.tokens.update({(arrival.name, index): [] for index in range(arrival.n)})

    def _disturb(self) -> None:
        """Abort and preempt what is to be now; reset the cache."""
        if self.turn == self.scenario.reset_cache_at:
            self.scheduler._blocks.reset_prefix_cache()
        for name in list(self.scheduler._requests):
            arrival, turn = self.arrivals[name], self.turn - self.arrivals[name].turn
            if arrival.preempt_at == turn:
                self._preempt_one(name)
            if arrival.abort_at == turn:
                self._note_states(name)
                self.scheduler.abort(name)
                for key in [(name, index) for index in range(arrival.n)]:
                    self.ended.setdefault(key, FinishReason.ABORT)

    def _preempt_one(self, name: str) -> None:
        for sequence in self.scheduler._requests[name]:
            if sequence.row is not None and not sequence.owes_a_token:
                self.seen["preemption without need"] += 1
                self.scheduler._preempt(sequence)
                return

    def _note_states(self, name: str) -> None:
        in_flight = {id(s) for step in self.scheduler._in_flight for s in step.sampled}
        for sequence in self.scheduler._requests[name]:
            state = sequence.status.value
            if sequence.status.value == "running":
                state = "chunk" if sequence.num_tokens == sequence.num_prompt_tokens else "decode"
                state = "last step" if sequence.is_drained else state
            self.seen[f"abort: {state}"] += 1
            self.seen["abort: in flight"] += id(sequence) in in_flight

    def _take_turn(self) -> None:
        output = None
        if len(self.runner.in_flight) < self.scenario.steps_in_flight:
            queue = list(self.scheduler._waiting._queue)
            output = self.scheduler.schedule()
            if output is not None:
                self._check_output(output, queue)
                self.runner.dispatch(output)
        full = len(self.runner.in_flight) >= self.scenario.steps_in_flight
        if self.runner.in_flight and (full or output is None or self.rng.random() < 0.3):
            self._take_updates(self.scheduler.update(self.runner.collect()))
        elif output is None and self.scheduler.has_unfinished():
            raise AssertionError("P2: sequences wait, no step is in flight, nothing is scheduled")
        self._check_progress()

    def _take_updates(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            key = (update.request_id, update.index)
            assert key not in self.ended, f"P1: {key} ended and goes on with {update}"
            self.tokens[key].extend(update.token_ids)
            self.idle_turns = 0
            prompt = self.requests[update.request_id].prompt_token_ids
            assert update.num_cached_tokens < len(prompt)
            if update.finish_reason is not None:
                self.ended[key] = update.finish_reason
                self.seen[f"ended: {update.finish_reason}"] += 1
            elif self._finds_stop_string(key):
                self.scheduler.finish_sequence(*key, FinishReason.STOP)
                self.ended[key] = FinishReason.STOP
                self.seen["ended: stop string"] += 1

    def _finds_stop_string(self, key: Key) -> bool:
        at = self.arrivals[key[0]].stop_string_at
        return at is not None and at[0] == key[1] and len(self.tokens[key]) >= at[1]

    def _why_row_fails(self, added: AddedSequence, num_computed_tokens: int) -> str | None:
        at = self.arrivals[added.request_id].fails_at
        if at is None or at[0] != added.index or num_computed_tokens < at[1]:
            return None
        return "the row's logits are not numbers"

    def _check_progress(self) -> None:
        self.idle_turns = self.idle_turns + 1 if self.scheduler.has_unfinished() else 0
        scenario = self.scenario
        steps_a_prompt = -(-scenario.max_model_len // scenario.max_num_batched_tokens)
        bound = (2 + scenario.steps_in_flight) * (4 + steps_a_prompt)
        assert self.idle_turns <= bound, f"P2: no token for {self.idle_turns} turns"

    def _check_output(self, output: SchedulerOutput, queue: list[Sequence]) -> None:
        scenario = self.scenario
        assert 0 < output.num_tokens <= scenario.max_num_batched_tokens, f"P4: {output}"
        assert self.scheduler.num_running <= scenario.max_num_seqs, "P4: too many rows"
        admitted = output.added + output.resumed
        overtaken = [self._standing(s.request_id, s.index) for s in queue if s.row is None]
        for added in admitted:
            standing = self._standing(added.request_id, added.index)
            assert all(standing < other for other in overtaken), f"P4: {added} overtakes"
        for sequence_id in output.preempted:
            resumed_at = self.tokens_at_resume.pop(sequence_id, -1)
            num_tokens = len(self.runner.rows[sequence_id].token_ids)
            assert num_tokens > resumed_at, f"P6: {sequence_id} is preempted without a token"
        for added in output.resumed:
            self.tokens_at_resume[added.sequence_id] = len(added.token_ids)
        self._note(output)

    def _standing(self, request_id: str, index: int) -> tuple[float, int, int]:
        """Return effective priority now, arrival, index: lower is better."""
        order = list(self.requests).index(request_id)
        waited_s = self.now_s - self.arrived_s[request_id]
        priority = self.requests[request_id].priority - waited_s / self.scenario.aging_s
        return (priority if self.scenario.policy == "priority" else 0.0, order, index)

    def _note(self, output: SchedulerOutput) -> None:
        self.seen["preemption"] += len(output.preempted)
        self.seen["resumption"] += len(output.resumed)
        self.seen["copy"] += len(output.block_copies)
        self.seen["cache hit"] += any(a.num_computed_tokens and not a.index for a in output.added)
        self.seen["hit on resume"] += any(a.num_computed_tokens for a in output.resumed)
        self.seen["fork"] += any(
            a.index and a.num_computed_tokens == a.num_prompt_tokens - 1 for a in output.added
        )
        self.seen["no fork"] += any(a.index and not a.num_computed_tokens for a in output.added)
        self.seen["mixed step"] += len(set(output.num_scheduled_tokens.values())) > 1

    def _check_answer(self, key: Key) -> None:
        request = self.requests[key[0]]
        scenario = self.scenario
        alone, reason = generate_alone(request, key[1], scenario.max_model_len, scenario.windows)
        got, ended = self.tokens[key], self.ended[key]
        assert got == alone[: len(got)], f"P1: {key} got {got}, alone {alone}"
        arrival = self.arrivals[key[0]]
        disturbed = ended in (FinishReason.ABORT, FinishReason.ERROR) or arrival.stop_string_at
        if not disturbed:
            assert (got, ended) == (alone, reason), f"P1: {key} got {got}, alone {alone}"


def why_it_fails(scenario: Scenario) -> str | None:
    """Return what went wrong in the run of a story, or None."""
    try:
        Simulation(scenario).run()
    except Exception:  # noqa: BLE001  whatever goes wrong is the answer
        return traceback.format_exc(limit=-4, chain=False)
    return None


def check_seed(seed: int) -> Counter[str]:
    """Run one seed and return what came up.

    Raises: AssertionError with the seed and the shrunk story.
    """
    scenario = draw_scenario(seed)
    simulation = Simulation(scenario)
    try:
        simulation.run()
    except Exception as failure:
        smallest = shrink(scenario, lambda story: why_it_fails(story) is not None)
        told = [f"seed {seed} fails; its shrunk story:", *smallest.lines()]
        raise AssertionError("\n".join([*told, why_it_fails(smallest) or ""])) from failure
    return simulation.seen


def run_seeds(seeds: Iterable[int]) -> Counter[str]:
    """Run seeds and return what came up. Raises: AssertionError for the first that fails."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        seen.update(check_seed(seed))
    return seen


def main() -> int:
    """Run many seeds and print what came up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    began_s = time.perf_counter()
    last = arguments.first + arguments.seeds
    shares = [range(arguments.first + j, last, arguments.jobs) for j in range(arguments.jobs)]
    with ProcessPoolExecutor(arguments.jobs) as processes:
        seen = sum(processes.map(run_seeds, shares), Counter())
    print(f"{arguments.seeds} seeds in {time.perf_counter() - began_s:.1f} s")
    print("\n".join(f"{count:8} {name}" for name, count in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
