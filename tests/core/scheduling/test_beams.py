"""Beam searches under pressure: each finds what a plain search over the whole vocabulary finds."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from typing import Any

import pytest
from attrs import define, field
from builders import Harness, make_harness
from fake_runner import (
    VOCAB_SIZE,
    FakeRunner,
    FakeStep,
    RowState,
    contents_of,
    generate_alone,
    next_content,
    reads_of,
    root_content,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_nothing_is_left, check_scheduler

from quire.config import SchedulerOptions
from quire.errors import RequestError
from quire.request import FinishReason, Request, SamplingParams, TokenLogprobs
from quire.scheduling.block_manager import BlockManager
from quire.scheduling.output import AddedSequence, KVCacheGroup, SchedulerOutput, StepResult
from quire.scheduling.scheduler import Scheduler

MAX_MODEL_LEN = 40
Found = list[tuple[list[int], FinishReason]]


def logprobs_of(reads: Items[Items[int]]) -> list[float]:
    """Return numbers that depend on all that is read, no two the same."""
    contents = dict.fromkeys(map(tuple, reads))
    return [-(hash((*contents, t)) % (10**9 + 7)) / 10**8 for t in range(VOCAB_SIZE)]


def reads_after(
    request: Request, generated: Items[int], windows: Items[int | None]
) -> list[Items[int]]:
    """Return what each kind of layers reads for the last of these tokens."""
    token_ids = (*request.prompt_token_ids, *generated)
    return reads_of(contents_of(request.cache_salt, token_ids), windows)


def search_alone(request: Request, windows: Items[int | None]) -> Found:
    """Search as `generate(num_beams=...)` does, over lists and the whole vocabulary."""
    options = request.params.beam_search
    assert options is not None
    width, penalty = options.beam_width, options.length_penalty
    longest = min(request.max_tokens, MAX_MODEL_LEN - len(request.prompt_token_ids))
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for length in range(1, longest + 1):
        found = [
            (so_far + more, [*tokens, token_id])
            for so_far, tokens in beams
            for token_id, more in enumerate(logprobs_of(reads_after(request, tokens, windows)))
            if length > request.params.min_tokens or token_id not in request.stop_token_ids
        ]
        found.sort(reverse=True)
        ends = [f for f in found[:width] if f[1][-1] in request.stop_token_ids or length == longest]
        done = sorted(done + [(s / length**penalty, t) for s, t in ends], reverse=True)[:width]
        beams = [f for f in found if f[1][-1] not in request.stop_token_ids][:width]
        if len(done) < width:
            continue
        reach = longest if options.early_stopping == "never" and penalty > 0 else length
        if options.early_stopping is True or beams[0][0] / reach**penalty <= done[-1][0]:
            break
    return [
        (t, FinishReason.STOP if t[-1] in request.stop_token_ids else FinishReason.LENGTH)
        for _, t in done[: request.params.n]
    ]


class BeamRunner(FakeRunner):
    """A fake runner that knows beams: tables that change, tokens that a search chose."""

    def _apply_rows(self, output: SchedulerOutput) -> None:
        super()._apply_rows(output)
        for sequence_id, changes in output.table_changes.items():
            for group, begin, block_ids in changes:
                table = self.rows[sequence_id].tables[group]
                assert begin <= len(table), f"{sequence_id} has a gap before block {begin}"
                table[begin:] = block_ids
        for sequence_id, token_id in output.chosen_token_ids.items():
            self.rows[sequence_id].token_ids[-1] = token_id
        ends = [(group, copy) for group, _, copy in output.block_copies]
        assert len(set(ends)) == len(ends), "a block is copied to twice"
        # A source may be a destination, too, where its owner was preempted in the same step: all
        # are read before any is written, so that a copy of a copy would read what was before.

    def _copy_blocks(self, output: SchedulerOutput, step: FakeStep) -> None:
        super()._copy_blocks(output, step)
        # Copies come before all else of a step: who gets a source later writes to it later.
        step.blocks -= {(group, source) for group, source, _ in output.block_copies}

    def _contents(self, state: RowState, end: int) -> list[int]:
        if not state.added.num_candidates:
            return super()._contents(state, end)
        # The tokens that a beam took over are known only by what lies in its slots.
        start, salt = state.num_computed_tokens, self._requests[state.added.request_id].cache_salt
        known: dict[int, int] = {}
        for g, group in enumerate(self.groups):
            for position in range(self._first_read(g, start), start):
                block = self._memory[g][state.tables[g][position // group.block_size]]
                content = block[position % group.block_size]
                assert known.setdefault(position, content) == content, "groups disagree"
        contents = [known.get(position, 0) for position in range(start)]
        before = contents[-1] if start else root_content(salt)
        for position in range(start, end):
            before = next_content(before, state.token_ids[position], position)
            contents.append(before)
        return contents

    def _check_beginning(self, added: AddedSequence) -> None:
        if not added.num_candidates:  # a beam shares what is in flight
            super()._check_beginning(added)

    def _sample(self, sequence_id: int, is_sampled: bool, step: FakeStep) -> None:
        super()._sample(sequence_id, is_sampled, step)
        state = self.rows[sequence_id]
        if is_sampled and state.added.num_candidates:
            logprobs = logprobs_of([self._read(state, g) for g in self._groups()])
            best = sorted(range(VOCAB_SIZE), key=lambda t: -logprobs[t])
            best = best[: state.added.num_candidates]
            step.result.logprobs[sequence_id] = TokenLogprobs(
                logprob=logprobs[best[0]],
                rank=1,
                top_ids=tuple(best),
                top_logprobs=tuple(logprobs[t] for t in best),
            )


def draw_request(rng: random.Random, name: str) -> Request:
    prompt = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
    max_tokens = rng.randint(1, 9)
    params: dict[str, Any] = {"max_tokens": max_tokens, "min_tokens": rng.choice([0, 0, 1])}
    if rng.random() < 0.75:
        width = rng.choice([1, 2, 3, 4])
        params |= {"n": rng.randint(1, width), "min_tokens": rng.randint(0, max_tokens)}
        params["beam_search"] = {
            "beam_width": width,
            "length_penalty": rng.choice([-1.0, 0.0, 1.0, 2.0]),
            "early_stopping": rng.choice([False, True, "never"]),
        }
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**params),
        max_tokens=max_tokens,
        seed=0,
        stop_token_ids=frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 1, 3]))),
        priority=rng.choice([0, 1]),
        cache_salt=rng.choice(["", "tenant"]),
    )


@define
class Run:
    """One story, drawn from a seed."""

    seed: int
    rng: random.Random = field(init=False)
    found: dict[str, dict[int, tuple[list[int], FinishReason | None]]] = field(factory=dict)
    ended_early: set[str] = field(factory=set)
    fails: set[str] = field(factory=set)
    requests: dict[str, Request] = field(factory=dict)
    windows: list[int | None] = field(factory=list)

    def run(self) -> None:
        """Serve everybody, while beams are preempted and requests are aborted."""
        self.rng = rng = random.Random(self.seed)
        scheduler, runner, max_num_seqs = self._start()
        depth = rng.randint(1, 3)
        pending = [draw_request(rng, f"r{i}") for i in range(rng.randint(1, 6))]
        self.fails = {r.request_id for r in pending if rng.random() < 0.07}
        while pending or scheduler.has_unfinished() or runner.in_flight:
            if pending and rng.random() < 0.5:
                self._add(scheduler, pending.pop())
            self._disturb(scheduler)
            output = scheduler.schedule() if len(runner.in_flight) < depth else None
            if output is not None:
                runner.dispatch(output)
            elif not runner.in_flight:
                assert not scheduler.has_unfinished(), "sequences wait and nothing is scheduled"
            check_scheduler(scheduler, max_num_seqs)
            if runner.in_flight and (output is None or rng.random() < 0.4):
                self._collect(scheduler, runner)
        check_nothing_is_left(scheduler)
        assert not scheduler._beams._changed
        assert not scheduler._beams._chosen
        for request in self.requests.values():
            self._check(request)

    def _start(self) -> tuple[Scheduler, BeamRunner, int]:
        rng = self.rng
        sizes = rng.choice([(4,), (2,), (1,), (4, 2), (2, 2)])
        usable = rng.randint(22, 60)
        self.windows = [rng.choice([None, None, 2, 3, 6]) for _ in sizes]
        slabs = [rng.choice([1, 2]) for _ in sizes]
        shares = len(sizes) > 1 and rng.random() < 0.5
        groups = [
            KVCacheGroup(
                layers=(g,),
                block_size=s,
                bytes_per_block=1,
                num_blocks=usable // min(sizes) * 2 + 1 if shares else usable // s + 1,
                window=self.windows[g],
                blocks_per_slab=slabs[g] if shares else None,
                block_stride=200,
            )
            for g, s in enumerate(sizes)
        ]
        max_num_seqs = rng.randint(4, 9)
        options = SchedulerOptions(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=rng.choice([4, 5, 9, 64]),
            scheduling_policy=rng.choice(["fcfs", "priority"]),
        )
        manager = BlockManager(
            groups,
            enable_prefix_caching=rng.random() < 0.7,
            max_step_tokens=options.max_num_batched_tokens,
        )
        scheduler = Scheduler(options, manager, MAX_MODEL_LEN, lambda: 0.0)
        runner = BeamRunner(
            groups, self.requests, max_num_seqs=max_num_seqs, fails=self._why_row_fails
        )
        return scheduler, runner, max_num_seqs

    def _why_row_fails(self, added: AddedSequence, num_computed_tokens: int) -> str | None:
        late = num_computed_tokens > added.num_prompt_tokens + 1
        return "not finite" if added.request_id in self.fails and late else None

    def _add(self, scheduler: Scheduler, request: Request) -> None:
        try:
            scheduler.add_request(request)
        except RequestError:
            return
        self.requests[request.request_id] = request
        self.found[request.request_id] = {i: ([], None) for i in range(request.params.n)}

    def _disturb(self, scheduler: Scheduler) -> None:
        running = [s for s in scheduler._running if not s.owes_a_token]
        if running and self.rng.random() < 0.08:
            scheduler._preempt(self.rng.choice(running))
        if scheduler._requests and self.rng.random() < 0.02:
            name = self.rng.choice(list(scheduler._requests))
            scheduler.abort(name)
            self.ended_early.add(name)

    def _collect(self, scheduler: Scheduler, runner: BeamRunner) -> None:
        for update in scheduler.update(runner.collect()):
            tokens, reason = self.found[update.request_id][update.index]
            assert reason is None, f"{update.request_id} ended before"
            tokens += update.token_ids
            self.found[update.request_id][update.index] = (tokens, update.finish_reason)
            if update.finish_reason is FinishReason.ERROR:
                assert update.request_id in self.fails
                self.ended_early.add(update.request_id)

    def _check(self, request: Request) -> None:
        if request.request_id in self.ended_early:
            return
        found = [self.found[request.request_id][i] for i in range(request.params.n)]
        if request.params.beam_search is not None:
            assert found == search_alone(request, self.windows), request
        else:
            assert found == [generate_alone(request, 0, MAX_MODEL_LEN, self.windows)], request


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32))
def test_beams_find_what_a_plain_search_finds_under_pressure(seed: int) -> None:
    Run(seed).run()


def add_search(harness: Harness, width: int, *, prompt: Items[int] = range(6), **more: Any) -> None:
    params = SamplingParams(n=width, max_tokens=5, beam_search={"beam_width": width})
    harness.scheduler.add_request(
        Request(
            request_id="r",
            prompt_token_ids=tuple(prompt),
            params=params,
            max_tokens=5,
            seed=0,
            **more,
        )
    )


def step(harness: Harness, top: dict[int, list[tuple[int, float]]] | None = None) -> Any:
    """Run a step in which each beam, by order, names the tokens 1, 2, 3, or those of `top`."""
    output = harness.schedule()
    names = top or {}
    result: dict[int, TokenLogprobs] = {}
    for place, sequence_id in enumerate(sorted(output.samples)):
        tokens = names.get(place, [(1, -0.1), (2, -0.2), (3, -0.3)])
        ids, values = zip(*tokens, strict=True)
        result[sequence_id] = TokenLogprobs(
            logprob=values[0], rank=1, top_ids=ids, top_logprobs=values
        )
    updates = harness.scheduler.update(
        StepResult(step_id=output.step_id, token_ids={i: [0] for i in result}, logprobs=result)
    )
    return output, updates


def test_beams_share_their_prompt_and_copy_its_last_partial_block_alone() -> None:
    harness = make_harness(block_size=4)
    add_search(harness, 3)
    step(harness)

    output = harness.schedule()

    assert len(output.resumed) == 2
    assert len(output.block_copies) == 2
    # One full block of the prompt, and a partial one each.
    assert harness.manager.num_used_blocks == 1 + 3


def test_beams_share_whole_blocks_without_a_copy() -> None:
    harness = make_harness(block_size=4)
    add_search(harness, 3, prompt=range(8))
    step(harness)

    output = harness.schedule()

    assert output.block_copies == []
    assert harness.manager.num_used_blocks == 2 + 3


def test_beam_that_takes_over_is_told_as_a_difference() -> None:
    harness = make_harness(block_size=4)
    add_search(harness, 2, prompt=range(16))
    step(harness)
    step(harness, {0: [(1, -9.0), (2, -9.1)], 1: [(3, -0.1), (4, -0.2)]})

    output = harness.schedule()

    assert output.resumed == []
    assert set(output.chosen_token_ids.values()) == {3, 4}
    changes = [change for found in output.table_changes.values() for change in found]
    assert [begin for _, begin, _ in changes] == [4] * len(changes)
    assert len(output.block_copies) == 1


def test_beam_is_not_scheduled_before_its_token_is_chosen() -> None:
    harness = make_harness()
    add_search(harness, 2)
    harness.schedule()

    assert harness.scheduler.schedule() is None


def test_abort_gives_all_blocks_of_a_search_back() -> None:
    harness = make_harness()
    add_search(harness, 4)
    step(harness, {0: [(token_id, -0.1 * token_id) for token_id in range(1, 9)]})
    step(harness)

    harness.scheduler.abort("r")

    check_nothing_is_left(harness.scheduler)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_num_seqs": 3}, "--max-num-seqs"),
        ({"max_num_batched_tokens": 3}, "--max-num-seqs"),
        ({"num_usable": 8, "max_num_seqs": 8}, "--kv-cache-memory-bytes"),
    ],
    ids=["rows", "tokens", "blocks"],
)
def test_search_whose_beams_never_fit_is_refused(options: dict[str, Any], said: str) -> None:
    harness = make_harness(**options)

    with pytest.raises(RequestError, match=said):
        add_search(harness, 4)

    check_nothing_is_left(harness.scheduler)
