"""A step on a toy model: what is sampled, fed back, copied and reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from naive_batch import NaiveSequence, added
from torch import Tensor
from toy_model import HIDDEN, VOCAB, build_toy, toy_tensors

from quire.execution import setup
from quire.execution.model_runner import ModelRunner
from quire.execution.processors import ProcessorChain
from quire.interfaces.attention import BatchLimits
from quire.interfaces.sampling import RowStatus, SampledTokens, Sampler, SamplingBatch
from quire.layers.places import places
from quire.scheduling.output import SchedulerOutput
from quire_attention.reference.backend import ReferenceAttention

LIMITS = BatchLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=32)
NUM_BLOCKS = 20


class Scripted(Sampler):
    """Return the most likely tokens, or what a test puts in `answer`."""

    def __init__(self) -> None:
        self.answer: SampledTokens | None = None
        self.logits: list[Tensor] = []

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        self.logits.append(logits.clone())
        if self.answer is not None:
            return self.answer
        best = logits.argmax(dim=-1, keepdim=True)
        return SampledTokens(token_ids=best, status=torch.zeros(len(best), dtype=torch.int32))


REFERENCE = setup.ChosenBackend(name="reference", backend_class=ReferenceAttention, options={})


def make_runner() -> tuple[ModelRunner, Scripted]:
    model = build_toy(num_hidden_layers=2)
    tensors = toy_tensors(layers=2)
    for name, place in places(model).items():
        place.view().copy_(tensors[name])
    spec = setup.attention_specs(
        model, dtype="float32", kv_dtype="auto", block_size=4, device="cpu"
    )[0]
    sampler = Scripted()
    runner = setup.make_runner(
        model=model,
        groups=setup.group_layers(model, {spec: REFERENCE}),
        num_blocks=NUM_BLOCKS,
        limits=LIMITS,
        sampler=sampler,
        processors=ProcessorChain([], LIMITS, torch.device("cpu")),
    )
    return runner, sampler


def sequence(number: int, length: int, *, blocks: list[int], computed: int = 0) -> Any:
    tokens = [(3 * number + 5 * i) % VOCAB for i in range(length)]
    return added(
        NaiveSequence(
            sequence_id=number,
            token_ids=tokens,
            num_prompt_tokens=length,
            num_computed=computed,
            row=number,
            tables=[blocks],
        )
    )


def run(runner: ModelRunner, step_id: int, counts: dict[int, int], **difference: Any) -> Any:
    output = SchedulerOutput(
        step_id=step_id, num_scheduled_tokens=counts, samples=set(counts), **difference
    )
    return runner.collect(runner.dispatch(output))


def test_sampled_tokens_come_back_by_sequence() -> None:
    runner, _ = make_runner()
    both = [sequence(0, 5, blocks=[1, 2]), sequence(1, 1, blocks=[3])]

    result = run(runner, 7, {1: 1, 0: 5}, added=both)

    assert result.step_id == 7
    assert set(result.token_ids) == {0, 1}
    assert all(len(tokens) == 1 for tokens in result.token_ids.values())
    assert result.errors == {}


def test_decoding_step_by_step_gives_the_logits_of_the_whole_at_once() -> None:
    runner, sampler = make_runner()
    tokens = [run(runner, 1, {0: 3}, added=[sequence(0, 3, blocks=[5, 2, 9])]).token_ids[0][0]]
    for step in range(2, 7):
        tokens += run(runner, step, {0: 1}).token_ids[0]
    stepwise = torch.cat(sampler.logits)

    whole, other = make_runner()
    prompt = sequence(0, 3, blocks=[1, 2, 3])
    prompt = evolve(prompt, token_ids=prompt.token_ids + tokens[:-1])
    run(whole, 1, {0: 8}, added=[prompt])

    torch.testing.assert_close(stepwise[-1:], other.logits[0], rtol=1e-4, atol=1e-4)


def test_step_without_samples_reports_nothing() -> None:
    runner, sampler = make_runner()
    output = SchedulerOutput(
        step_id=1, added=[sequence(0, 6, blocks=[1, 2])], num_scheduled_tokens={0: 4}
    )

    result = runner.collect(runner.dispatch(output))

    assert (result.token_ids, result.errors) == ({}, {})
    assert sampler.logits == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(RowStatus.NOT_FINITE, "not finite"), (RowStatus.OUT_OF_RANGE, "outside the vocabulary")],
)
def test_failed_row_is_reported_alone(status: RowStatus, words: str) -> None:
    runner, sampler = make_runner()
    sampler.answer = SampledTokens(
        token_ids=torch.tensor([[1], [2]]), status=torch.tensor([status, 0], dtype=torch.int32)
    )
    both = [sequence(0, 2, blocks=[1]), sequence(1, 2, blocks=[3])]

    result = run(runner, 1, {0: 2, 1: 2}, added=both)

    assert result.token_ids == {1: [2]}
    assert list(result.errors) == [0]
    assert words in result.errors[0]


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**40])
def test_token_outside_the_vocabulary_ends_its_row_and_not_the_engine(token_id: int) -> None:
    runner, sampler = make_runner()
    both = [sequence(0, 2, blocks=[1, 7]), sequence(1, 2, blocks=[3, 8])]
    sampler.answer = SampledTokens(
        token_ids=torch.tensor([[token_id], [2]]), status=torch.zeros(2, dtype=torch.int32)
    )
    first = runner.dispatch(
        SchedulerOutput(step_id=1, added=both, num_scheduled_tokens={0: 2, 1: 2}, samples={0, 1})
    )
    sampler.answer = None

    # The next step is in flight before anybody has seen the bad token.
    second = runner.dispatch(
        SchedulerOutput(step_id=2, num_scheduled_tokens={0: 1, 1: 1}, samples={0, 1})
    )

    assert "outside the vocabulary" in runner.collect(first).errors[0]
    assert 1 in runner.collect(second).token_ids


def test_sampler_with_several_tokens_a_row_gives_as_many_as_count() -> None:
    runner, sampler = make_runner()
    sampler.answer = SampledTokens(
        token_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]),
        status=torch.zeros(2, dtype=torch.int32),
        num_tokens=torch.tensor([1, 3], dtype=torch.int32),
    )
    both = [sequence(0, 2, blocks=[1]), sequence(1, 2, blocks=[3])]

    result = run(runner, 1, {0: 2, 1: 2}, added=both)

    assert result.token_ids == {0: [1], 1: [4, 5, 6]}


def test_blocks_are_copied_before_the_forward_pass() -> None:
    runner, sampler = make_runner()
    run(runner, 1, {0: 6}, added=[sequence(0, 6, blocks=[1, 2])])
    child = NaiveSequence(
        sequence_id=1,
        token_ids=sequence(0, 6, blocks=[]).token_ids,
        num_prompt_tokens=6,
        num_computed=5,
        row=1,
        tables=[[1, 4]],
    )

    run(runner, 2, {1: 1}, added=[added(child)], block_copies=[(0, 2, 4)])

    torch.testing.assert_close(sampler.logits[1], sampler.logits[0])


def test_nan_in_a_layer_is_no_exception() -> None:
    runner, _ = make_runner()
    runner.model.layers[1].o_proj.weight.data.fill_(float("nan"))

    result = run(runner, 1, {0: 3}, added=[sequence(0, 3, blocks=[1])])

    assert set(result.token_ids) | set(result.errors) == {0}


def test_largest_batch_fills_the_budget_within_the_limits() -> None:
    runner, _ = make_runner()
    model = runner.model
    spec = setup.attention_specs(
        model, dtype="float32", kv_dtype="auto", block_size=4, device="cpu"
    )[0]
    groups = setup.group_layers(model, {spec: REFERENCE})

    output = setup.largest_batch(LIMITS, groups)

    assert output.num_tokens == LIMITS.max_num_batched_tokens
    assert len(output.added) <= LIMITS.max_num_seqs
    assert len(runner.collect(runner.dispatch(output)).token_ids) == len(output.added)
    assert runner.model.config.hidden_size == HIDDEN


@pytest.mark.parametrize("limit", [{}, {"max_num_seqs": 1}, {"max_model_len": 1}])
def test_warming_steps_run_within_any_limits(limit: dict[str, int]) -> None:
    limits = evolve(LIMITS, **limit)
    runner, _ = make_runner()
    spec = setup.attention_specs(
        runner.model, dtype="float32", kv_dtype="auto", block_size=4, device="cpu"
    )[0]
    groups = setup.group_layers(runner.model, {spec: REFERENCE})

    for output in setup.warming_steps(limits, groups):
        assert len(output.added) <= limits.max_num_seqs
        assert max(output.num_scheduled_tokens.values()) <= limits.max_model_len
        assert runner.collect(runner.dispatch(output)).errors == {}
