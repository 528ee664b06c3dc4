"""Logits processors see every token so far, the one in flight included, and only their rows."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from naive_batch import NaiveSequence, added
from torch import Tensor
from toy_model import VOCAB

from quire.errors import PluginError
from quire.execution.batch_builder import BuiltBatch
from quire.execution.processors import ProcessorChain
from quire.interfaces.attention import BatchLimits
from quire.interfaces.sampling import LogitsProcessor, LogitsState
from quire.request import SamplingParams
from quire.scheduling.output import SchedulerOutput

LIMITS = BatchLimits(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=10)


class Recorder(LogitsProcessor):
    """Note every call; add one to the logits of the tokens that a row has seen."""

    name = "recorder"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls: list[Any] = []

    def add_row(self, row: int, arguments: Any, params: SamplingParams) -> None:
        self.calls.append(("add", row, arguments))

    def remove_row(self, row: int) -> None:
        self.calls.append(("remove", row))

    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        for i, row in enumerate(state.rows.tolist()):
            count = int(state.num_tokens[row])
            logits[i, state.token_history[row, :count].long()] += 1
        self.calls.append(("apply", state.host_rows, dict(state.host_token_ids)))
        return logits


class HostRecorder(Recorder):
    """One that needs the tokens on the host."""

    name = "host-recorder"
    needs_host_tokens: ClassVar[bool] = True


def make_chain(*kinds: type[Recorder]) -> tuple[ProcessorChain, list[Recorder]]:
    made = [kind(VOCAB, LIMITS.max_num_seqs, "cpu") for kind in kinds]
    return ProcessorChain(made, LIMITS, torch.device("cpu")), made


def sequence(row: int, tokens: list[int], params: SamplingParams | None = None) -> Any:
    naive = NaiveSequence(
        sequence_id=10 + row, token_ids=tokens, num_prompt_tokens=2, row=row, tables=[[1]]
    )
    return added(naive, params=params or SamplingParams())


def built(rows: list[int]) -> BuiltBatch:
    return BuiltBatch(
        batch=None,  # type: ignore[arg-type]
        sampled_ids=[10 + row for row in rows],
        sampled_rows=rows,
        sampled_positions=np.zeros(len(rows), np.int32),
    )


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_chain_without_processors_is_false_and_does_nothing() -> None:
    chain, _ = make_chain()

    chain.add(sequence(0, [1, 2]))
    chain.remove(SchedulerOutput(step_id=1, finished=[10]), {10: 0})

    assert not chain
    assert not chain.needs_host_tokens


def test_history_holds_known_and_sampled_tokens_of_each_row() -> None:
    chain, (recorder,) = make_chain(Recorder)
    chain.add(sequence(2, [5, 6, 7]))
    chain.add(sequence(0, [1, 1]))
    chain.append(ints([2, 0]), ints([8, 9]))
    chain.append(ints([2]), ints([5]))

    logits = chain.apply(torch.zeros(2, VOCAB), built([0, 2]), ints([0, 2]))

    assert logits[0].nonzero().flatten().tolist() == [1, 9]
    assert logits[1].nonzero().flatten().tolist() == [5, 6, 7, 8]
    assert recorder.calls[-1] == ("apply", [0, 2], {})


def test_row_that_changes_hands_starts_anew() -> None:
    chain, (recorder,) = make_chain(Recorder)
    chain.add(sequence(1, [5, 6, 7]))
    chain.remove(SchedulerOutput(step_id=1, preempted=[11]), {11: 1})
    chain.add(sequence(1, [3, 4]))

    logits = chain.apply(torch.zeros(1, VOCAB), built([1]), ints([1]))

    assert logits[0].nonzero().flatten().tolist() == [3, 4]
    assert [call[0] for call in recorder.calls] == ["add", "remove", "add", "apply"]


def test_sequence_that_never_had_a_row_is_no_removal() -> None:
    chain, (recorder,) = make_chain(Recorder)

    chain.remove(SchedulerOutput(step_id=1, finished=[99]), {})

    assert recorder.calls == []


def test_arguments_come_from_the_request_by_the_processors_name() -> None:
    chain, (first, second) = make_chain(Recorder, HostRecorder)

    chain.add(sequence(0, [1, 2], SamplingParams(extra_args={"recorder": {"x": 1}})))

    assert first.calls == [("add", 0, {"x": 1})]
    assert second.calls == [("add", 0, None)]


def test_host_tokens_are_kept_for_those_that_need_them() -> None:
    chain, (recorder,) = make_chain(HostRecorder)
    assert chain.needs_host_tokens
    chain.add(sequence(3, [5, 6]))
    chain.append(ints([3]), ints([4]))

    chain.apply(torch.zeros(1, VOCAB), built([3]), ints([3]))
    chain.remove(SchedulerOutput(step_id=1, finished=[13]), {13: 3})
    chain.apply(torch.zeros(0, VOCAB), built([]), ints([]))

    assert recorder.calls[-3:] == [
        ("apply", [3], {3: [5, 6, 4]}),
        ("remove", 3),
        ("apply", [], {}),
    ]


def test_processors_work_in_the_order_in_which_they_are_named() -> None:
    class Doubler(Recorder):
        name = "doubler"

        def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
            return logits * 2

    chain, _ = make_chain(Recorder, Doubler)
    chain.add(sequence(0, [1, 2]))

    logits = chain.apply(torch.zeros(1, VOCAB), built([0]), ints([0]))

    assert logits[0].max() == 2


def test_history_has_room_for_the_longest_sequence_and_the_token_in_flight() -> None:
    chain, _ = make_chain(Recorder)
    chain.add(sequence(0, list(range(LIMITS.max_model_len))))

    chain.append(ints([0]), ints([3]))

    logits = chain.apply(torch.zeros(1, VOCAB), built([0]), ints([0]))
    assert logits[0, 3] == 1


@pytest.mark.parametrize("length", [2, 5])
def test_prompt_length_is_told_apart_from_what_was_generated(length: int) -> None:
    seen: list[int] = []

    class PromptReader(Recorder):
        name = "prompt-reader"

        def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
            seen.append(int(state.num_prompt_tokens[0]))
            seen.append(int(state.num_tokens[0]))
            return logits

    chain, _ = make_chain(PromptReader)
    chain.add(sequence(0, [1] * length))

    chain.apply(torch.zeros(1, VOCAB), built([0]), ints([0]))

    assert seen == [2, length]


@pytest.mark.parametrize(("returned", "message"), [(None, "NoneType"), (torch.ones(2), r"\[2\]")])
def test_what_is_returned_has_to_be_the_logits(returned: Any, message: str) -> None:
    class Returns(Recorder):
        def apply(self, logits: Tensor, state: LogitsState) -> Any:
            return returned

    chain, _ = make_chain(Returns)

    with pytest.raises(PluginError, match=f"'recorder' returned {message}"):
        chain.apply(torch.zeros(1, VOCAB), built([1]), ints([1]))


def test_failures_name_the_processor() -> None:
    class Fails(Recorder):
        def add_row(self, row: int, arguments: Any, params: SamplingParams) -> None:
            raise KeyError("x")

        def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
            raise RuntimeError("boom")

    chain, _ = make_chain(Fails)

    with pytest.raises(PluginError, match="'recorder' failed: RuntimeError: boom"):
        chain.apply(torch.zeros(1, VOCAB), built([1]), ints([1]))
    with pytest.raises(PluginError, match="'recorder' failed: KeyError"):
        chain.add(sequence(1, [5, 6]))
