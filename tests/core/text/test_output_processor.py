"""From token ids to outputs: text, stop strings, counts, deltas, and failures of one alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.request import (
    FinishReason,
    Logprob,
    Request,
    RequestOutput,
    SamplingParams,
    SequenceUpdate,
    TokenLogprobs,
)
from quire.text.output_processor import OutputProcessor
from quire.text.tokenizer import Tokenizer

RELAXED = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def gpt2(tokenizer_of: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_of("gpt2")


def build_request(tokenizer: Tokenizer, request_id: str = "r", **params: Any) -> Request:
    sampling = SamplingParams(max_tokens=None, **params)
    prompt = tuple(tokenizer.encode("hello"))
    return Request(
        request_id=request_id, prompt_token_ids=prompt, params=sampling, max_tokens=99, seed=1
    )


def update(ids: Any, finish: FinishReason | None = None, **values: Any) -> SequenceUpdate:
    fields = {"request_id": "r", "index": 0, **values}
    return SequenceUpdate(token_ids=tuple(ids), finish_reason=finish, **fields)


def run_text(
    tokenizer: Tokenizer, text: str, finish: FinishReason | None, size: int = 1, **params: Any
) -> tuple[OutputProcessor, list[Any]]:
    """Feed a text in updates of `size` tokens; the last one carries the finish reason."""
    processor = OutputProcessor(tokenizer)
    processor.add_request(build_request(tokenizer, **params), "hello")
    ids = tokenizer.encode(text, add_special_tokens=False)
    chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
    ends = [*[None] * (len(chunks) - 1), finish]
    results = [processor.process([update(c, e)]) for c, e in zip(chunks, ends, strict=True)]
    return processor, results


def only(output: RequestOutput) -> Any:
    (completion,) = output.outputs
    return completion


def test_outputs_are_cumulative_and_carry_the_prompt(gpt2: Tokenizer) -> None:
    processor, _ = run_text(gpt2, " world and more", None)

    output = processor.output("r")

    assert (output.request_id, output.prompt, output.finished) == ("r", "hello", False)
    assert output.prompt_token_ids == gpt2.encode("hello")
    assert only(output).text == " world and more"
    assert only(output).token_ids == gpt2.encode(" world and more")
    assert only(output).finish_reason is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_stop_string_cuts_text_and_tokens_where_it_was_completed(
    gpt2: Tokenizer, size: int
) -> None:
    processor, results = run_text(gpt2, "the fox. jumps over", None, size, stop=["x. j"])

    completion = only(processor.output("r"))

    assert completion.text == "the fo"
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "x. j")
    kept = gpt2.decode(completion.token_ids)
    assert kept.startswith("the fox. j")
    assert not gpt2.decode(completion.token_ids[:-1]).startswith("the fox. j")
    assert [r.to_finish for r in results if r.to_finish] == [(("r", 0),)]
    assert processor.output("r").finished


def test_the_stop_string_is_shown_when_asked_for(gpt2: Tokenizer) -> None:
    processor, _ = run_text(
        gpt2, "the fox. jumps", None, stop=["x."], include_stop_str_in_output=True
    )

    assert only(processor.output("r")).text == "the fox."


def test_a_stop_string_in_the_final_update_wins_over_its_length(gpt2: Tokenizer) -> None:
    processor, results = run_text(gpt2, "a fox.", FinishReason.LENGTH, 99, stop=["."])

    completion = only(processor.output("r"))

    assert (completion.text, completion.finish_reason) == ("a fox", "stop")
    assert results[-1].to_finish == ()
    assert results[-1].finished == ("r",)


def test_what_was_held_back_is_given_when_the_sequence_ends(gpt2: Tokenizer) -> None:
    processor, _ = run_text(gpt2, "a fox", FinishReason.LENGTH, stop=["fox."])

    assert only(processor.output("r")).text == "a fox"
    assert only(processor.output("r")).finish_reason == "length"


def test_stop_strings_are_searched_only_after_min_tokens(gpt2: Tokenizer) -> None:
    num_first = len(gpt2.encode("a. b"))
    processor, _ = run_text(gpt2, "a. b. c", None, stop=["."], min_tokens=num_first)

    assert only(processor.output("r")).text == "a. b"


def test_the_end_token_counts_but_is_not_in_the_text(gpt2: Tokenizer) -> None:
    eos = gpt2.eos_token_id
    assert eos is not None
    processor = OutputProcessor(gpt2)
    processor.add_request(build_request(gpt2, skip_special_tokens=False))
    ids = gpt2.encode(" hi")

    processor.process([update([*ids, eos], FinishReason.STOP)])

    completion = only(processor.output("r"))
    assert (completion.text, completion.token_ids) == (" hi", [*ids, eos])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_a_stop_token_is_named_and_shown_only_when_asked_for(gpt2: Tokenizer) -> None:
    processor = OutputProcessor(gpt2)
    stop_id = gpt2.encode("!")[0]
    params = {"stop_token_ids": [stop_id], "include_stop_str_in_output": True}
    processor.add_request(build_request(gpt2, **params))

    processor.process([update([stop_id], FinishReason.STOP, stop_reason=stop_id)])

    completion = only(processor.output("r"))
    assert (completion.text, completion.stop_reason) == ("!", stop_id)


def test_updates_after_the_end_are_dropped(gpt2: Tokenizer) -> None:
    processor, _ = run_text(gpt2, "a fox. b", None, stop=["."])
    before = processor.output("r")

    late = processor.process([update([5, 6], FinishReason.LENGTH), update([7], request_id="x")])

    assert (late.changed, late.finished, late.to_finish) == ((), (), ())
    assert processor.output("r") == before


@RELAXED
@given(
    ids=st.lists(st.integers(0, 399), max_size=40),
    size=st.integers(1, 5),
    stops=st.lists(st.text(st.sampled_from("ae t."), min_size=1, max_size=3), max_size=3),
)
def test_deltas_put_together_equal_the_final_output(
    ids: list[int], size: int, stops: list[str], gpt2: Tokenizer
) -> None:
    processor = OutputProcessor(gpt2)
    processor.add_request(build_request(gpt2, stop=stops))
    deltas = []
    for first in range(0, len(ids), size):
        processor.process([update(ids[first : first + size])])
        deltas.append(processor.take_delta("r", 0))
    processor.process([update([], FinishReason.LENGTH)])
    deltas.append(processor.take_delta("r", 0))

    final = only(processor.output("r"))

    assert "".join(delta.text for delta in deltas) == final.text
    assert [i for delta in deltas for i in delta.token_ids] == final.token_ids
    assert deltas[-1].finish_reason == final.finish_reason
    assert not any(stop in final.text for stop in stops)


@RELAXED
@given(
    ids=st.lists(st.integers(0, 399), min_size=1, max_size=30),
    stops=st.lists(st.text(st.sampled_from("ae t."), min_size=1, max_size=3), max_size=3),
)
def test_the_size_of_updates_changes_nothing(
    ids: list[int], stops: list[str], gpt2: Tokenizer
) -> None:
    outputs = []
    for chunks in ([ids], [[token_id] for token_id in ids]):
        processor = OutputProcessor(gpt2)
        processor.add_request(build_request(gpt2, stop=stops))
        processor.process([update(chunk) for chunk in chunks])
        processor.process([update([], FinishReason.LENGTH)])
        outputs.append(processor.remove("r"))

    assert outputs[0] == outputs[1]


def test_sequences_of_one_request_are_kept_apart(gpt2: Tokenizer) -> None:
    processor = OutputProcessor(gpt2)
    processor.add_request(build_request(gpt2, n=3, stop=["."]))
    ids = [gpt2.encode(text) for text in (" one", " two.", " three")]

    result = processor.process([update(ids[i], index=i) for i in range(3)])

    assert result.to_finish == (("r", 1),)
    assert result.finished == ()
    texts = [completion.text for completion in processor.output("r").outputs]
    assert texts == [" one", " two", " three"]
    done = processor.process(
        [update([], FinishReason.LENGTH, index=i, num_cached_tokens=i) for i in (0, 2)]
    )
    assert done.finished == ("r",)
    assert processor.output("r").num_cached_tokens == 2


def test_without_detokenizing_there_are_tokens_and_no_text(gpt2: Tokenizer) -> None:
    processor = OutputProcessor(gpt2)
    processor.add_request(build_request(gpt2, detokenize=False))

    processor.process([update([1, 2, 3], FinishReason.LENGTH)])

    assert (only(processor.output("r")).text, only(processor.output("r")).token_ids) == (
        "",
        [1, 2, 3],
    )


def test_a_failure_in_one_request_does_not_touch_the_others(
    gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = OutputProcessor(gpt2)
    processor.add_request(build_request(gpt2, "bad"))
    processor.add_request(build_request(gpt2, "good"))
    broken = processor._requests["bad"].outputs[0].detokenizer
    monkeypatch.setattr(broken, "_stream", None)

    result = processor.process([update([40], request_id=r) for r in ("bad", "good")])

    assert result.to_finish == (("bad", 0),)
    assert only(processor.output("bad")).finish_reason == "error"
    assert "detokenizing failed" in (processor.error("bad") or "")
    assert only(processor.output("good")).finish_reason is None
    assert processor.error("good") is None


def test_logprobs_that_do_not_fit_end_their_sequence_alone(gpt2: Tokenizer) -> None:
    processor = OutputProcessor(gpt2)
    processor.add_request(build_request(gpt2, "bad", prompt_logprobs=0))
    processor.add_request(build_request(gpt2, "good"))
    updates = [update([40], request_id=r) for r in ("bad", "good")]
    updates[0].prompt_logprobs = (None,) * 99

    result = processor.process(updates)

    assert result.to_finish == (("bad", 0),)
    assert only(processor.output("bad")).finish_reason == "error"
    assert only(processor.output("good")).token_ids == [40]


def test_an_engine_error_ends_its_sequence_with_the_reason(gpt2: Tokenizer) -> None:
    processor, _ = run_text(gpt2, " hi", None)

    processor.process([update([], FinishReason.ERROR, error="NaN logits")])

    assert processor.take_delta("r", 0).error == "NaN logits"
    assert only(processor.output("r")).finish_reason == "error"


def test_an_aborted_request_keeps_what_it_had(gpt2: Tokenizer) -> None:
    processor, _ = run_text(gpt2, "a fox", None, stop=["fox."])

    processor.abort("r")
    output = processor.remove("r")

    assert (only(output).text, only(output).finish_reason) == ("a fox", "abort")
    assert "r" not in processor
    assert len(processor) == 0


def scored(ids: list[int], **values: Any) -> SequenceUpdate:
    """Return an update whose token i has log-probability -i, after a better one, token 390."""
    found = tuple(
        TokenLogprobs(logprob=-float(i), rank=2, top_ids=(390, i), top_logprobs=(-0.1, -float(i)))
        for i in ids
    )
    return update(ids, logprobs=found, **values)


def test_chosen_token_comes_first_in_its_dict_and_is_not_there_twice(gpt2: Tokenizer) -> None:
    processor = OutputProcessor(gpt2)
    processor.add_request(build_request(gpt2, logprobs=2))

    processor.process([scored([40]), scored([41])])

    completion = only(processor.output("r"))
    assert [list(entry) for entry in completion.logprobs] == [[40, 390], [41, 390]]
    first = completion.logprobs[0]
    assert first[40] == Logprob(-40.0, 2, gpt2.decode([40]))
    assert (first[390].logprob, first[390].rank) == (-0.1, 1)
    assert completion.cumulative_logprob == -81.0


def test_prompt_logprobs_begin_with_none_and_stay(gpt2: Tokenizer) -> None:
    processor = OutputProcessor(gpt2)
    request = build_request(gpt2, prompt_logprobs=0)
    processor.add_request(request)
    assert processor.prompt_logprobs("r") is None
    others = request.prompt_token_ids[1:]
    found = (None, *(TokenLogprobs(logprob=-0.5, rank=3) for _ in others))

    processor.process([update([40], prompt_logprobs=found)])

    entries = processor.prompt_logprobs("r")
    assert entries is not None
    assert entries[0] is None
    assert [list(entry or ()) for entry in entries[1:]] == [[i] for i in others]
    assert processor.output("r").prompt_logprobs == entries
    assert only(processor.output("r")).logprobs is None


@RELAXED
@given(
    ids=st.lists(st.integers(0, 389), max_size=40),
    size=st.integers(1, 5),
    stops=st.lists(st.text(st.sampled_from("ae t."), min_size=1, max_size=3), max_size=3),
)
def test_there_is_one_entry_for_each_token_that_is_shown(
    ids: list[int], size: int, stops: list[str], gpt2: Tokenizer
) -> None:
    processor = OutputProcessor(gpt2)
    processor.add_request(build_request(gpt2, stop=stops, logprobs=1))
    deltas = []
    for first in range(0, len(ids), size):
        processor.process([scored(ids[first : first + size])])
        deltas.append(processor.take_delta("r", 0))
    processor.process([update([], FinishReason.LENGTH)])
    deltas.append(processor.take_delta("r", 0))

    final = only(processor.output("r"))

    assert [next(iter(entry)) for entry in final.logprobs] == final.token_ids
    assert [entry for delta in deltas for entry in delta.logprobs] == final.logprobs
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)


def test_without_logprobs_asked_for_there_are_none(gpt2: Tokenizer) -> None:
    processor, _ = run_text(gpt2, " world", FinishReason.LENGTH)

    assert processor.take_delta("r", 0).logprobs is None
    assert only(processor.output("r")).logprobs is None
    assert only(processor.output("r")).cumulative_logprob is None


def run_best_of(
    gpt2: Tokenizer, logprobs: list[list[float]], count: int, **fields: Any
) -> RequestOutput:
    """Run sequences of one token a log-probability; the last token ends each."""
    processor = OutputProcessor(gpt2)
    request = build_request(gpt2, n=len(logprobs), logprobs=0)
    processor.add_request(evolve(request, num_best=count, **fields))
    for index, values in enumerate(logprobs):
        for i, value in enumerate(values):
            finish = FinishReason.LENGTH if i == len(values) - 1 else None
            entry = TokenLogprobs(logprob=value, rank=1)
            processor.process([update([20 + index], finish, index=index, logprobs=(entry,))])
    return processor.remove("r")


def test_best_of_returns_the_highest_cumulative_logprobs_numbered_anew(gpt2: Tokenizer) -> None:
    logprobs = [[-2.0, -3.0], [-1.0], [-0.5, -0.25, -0.125], [-9.0], [-1.0]]

    output = run_best_of(gpt2, logprobs, 4)

    assert output.finished
    assert [one.index for one in output.outputs] == [0, 1, 2, 3]
    assert [one.token_ids[0] for one in output.outputs] == [22, 21, 24, 20]
    assert [one.cumulative_logprob for one in output.outputs] == [-0.875, -1.0, -1.0, -5.0]
    assert [len(one.logprobs or ()) for one in output.outputs] == [3, 1, 1, 2]


def test_best_of_hides_logprobs_that_nobody_asked_for(gpt2: Tokenizer) -> None:
    output = run_best_of(gpt2, [[-2.0], [-1.0]], 1, hides_logprobs=True)

    assert [(one.token_ids, one.logprobs) for one in output.outputs] == [([21], None)]


def test_best_of_takes_a_sequence_that_failed_last(gpt2: Tokenizer) -> None:
    processor = OutputProcessor(gpt2)
    request = build_request(gpt2, n=2, logprobs=0)
    processor.add_request(evolve(request, num_best=1))
    entry = TokenLogprobs(logprob=-7.0, rank=1)
    processor.process([update([], FinishReason.ERROR, index=0, error="not finite")])
    processor.process([update([33], FinishReason.LENGTH, index=1, logprobs=(entry,))])

    assert only(processor.output("r")).token_ids == [33]
