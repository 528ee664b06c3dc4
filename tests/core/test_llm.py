"""`LLM` takes what vLLM's takes, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
from tiny_llama import OPTIONS, has_all_blocks

from quire import LLM, RequestOutput, SamplingParams
from quire.errors import ConfigError, EngineDeadError, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
QUIET: dict[str, Any] = {"use_tqdm": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return tiny_llama.write_tokenizer(tiny_llama.write_folder(folder, vocab_size=256))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[LLM]:
    llm = LLM(str(folder), **{**OPTIONS, "skip_tokenizer_init": False})
    yield llm
    llm.frontend.close()


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared LLM; afterwards no request is left and every block is free."""
    yield shared
    assert not shared.engine.has_unfinished()
    assert has_all_blocks(shared.engine)
    assert len(shared._outputs._requests) == 0


def ids(llm: LLM, text: str) -> list[int]:
    return llm.get_tokenizer().encode(text)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_prompt_may_be_a_text_ids_or_either_in_a_mapping(llm: LLM) -> None:
    text, token_ids = "coffee", ids(llm, "coffee")

    found = [
        llm.generate(prompts, GREEDY, **QUIET)
        for prompts in (
            text,
            [text],
            token_ids,
            [token_ids],
            {"prompt": text},
            [{"prompt_token_ids": token_ids}],
        )
    ]

    assert all(len(outputs) == 1 for outputs in found)
    assert len({tuple(outputs[0].outputs[0].token_ids) for outputs in found}) == 1
    assert [outputs[0].prompt for outputs in found] == [text, text, None, None, text, None]
    assert all(outputs[0].prompt_token_ids == token_ids for outputs in found)


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"order {i} " + "x" * (3 * i) for i in range(12)]
    params = [SamplingParams(temperature=0.0, max_tokens=12 - i) for i in range(12)]

    outputs = llm.generate(prompts, params, **QUIET)

    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(12, 0, -1))
    assert all(output.finished for output in outputs)


def test_output_has_the_fields_of_vllms(llm: LLM) -> None:
    (output,) = llm.generate("tea", GREEDY, **QUIET)

    (completion,) = output.outputs
    assert isinstance(output.request_id, str)
    assert output.prompt_logprobs is None
    assert completion.index == 0
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
    assert completion.finish_reason == "length"
    assert completion.stop_reason is None
    assert completion.logprobs is None
    assert completion.finished()


def test_one_params_serves_all_and_none_takes_the_models_defaults(llm: LLM) -> None:
    outputs = llm.generate(["a", "b"], GREEDY, **QUIET)
    (default,) = llm.generate("a", **QUIET)

    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8]
    assert len(default.outputs[0].token_ids) == SamplingParams().max_tokens
    assert llm.get_default_sampling_params() == SamplingParams()


def test_several_sequences_come_by_index(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=10)

    (first,) = llm.generate("latte", params, **QUIET)
    (again,) = llm.generate("latte", params, **QUIET)

    assert [completion.index for completion in first.outputs] == [0, 1, 2]
    assert len({completion.text for completion in first.outputs}) == 3
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]


def test_unseeded_requests_differ_and_seeded_ones_do_not(llm: LLM) -> None:
    free = SamplingParams(temperature=1.0, max_tokens=12)
    seeded = free.with_values(seed=3)

    one, two, three, four = llm.generate(["x"] * 4, [free, seeded, free, seeded], **QUIET)

    assert one.outputs[0].token_ids != three.outputs[0].token_ids
    assert two.outputs[0].token_ids == four.outputs[0].token_ids


def test_stop_string_ends_the_text_before_it_and_later_tokens_do_not_count(llm: LLM) -> None:
    (whole,) = llm.generate("stop here", GREEDY.with_values(max_tokens=40), **QUIET)
    text = whole.outputs[0].text
    stop = text[5:8]
    at = text.index(stop)

    params = GREEDY.with_values(max_tokens=40, stop=[stop])
    (found,) = llm.generate("stop here", params, **QUIET)
    kept = llm.generate("stop here", params.with_values(include_stop_str_in_output=True), **QUIET)

    assert found.outputs[0].text == text[:at]
    assert found.outputs[0].finish_reason == "stop"
    assert found.outputs[0].stop_reason == stop
    assert len(found.outputs[0].token_ids) < 40
    assert texts(kept) == [text[: at + len(stop)]]


def test_stop_token_ends_the_sequence_and_is_told(llm: LLM) -> None:
    (whole,) = llm.generate("token", GREEDY.with_values(max_tokens=30), **QUIET)
    token_ids = whole.outputs[0].token_ids
    stop = token_ids[6]

    (found,) = llm.generate(
        "token", GREEDY.with_values(max_tokens=30, stop_token_ids=[stop]), **QUIET
    )

    completion = found.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == token_ids[: token_ids.index(stop) + 1]


def test_min_tokens_holds_a_stop_token_back(llm: LLM) -> None:
    (whole,) = llm.generate("hold", GREEDY, **QUIET)
    stop = whole.outputs[0].token_ids[0]

    (found,) = llm.generate(
        "hold", GREEDY.with_values(stop_token_ids=[stop], min_tokens=5), **QUIET
    )

    assert stop not in found.outputs[0].token_ids[:5]
    assert len(found.outputs[0].token_ids) >= 5


def test_chat_writes_the_template_and_several_conversations_are_one_batch(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]

    (alone,) = llm.chat(messages, GREEDY, **QUIET)
    both = llm.chat([messages, messages], GREEDY, **QUIET)

    assert alone.prompt == "<user>Hello\n<assistant>"
    assert texts(both) == texts([alone]) * 2


def test_chat_takes_a_template_of_the_callers(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]

    for mark in ("#", "%", "%"):
        template = "{% for m in messages %}" + mark + "{{ m.content }}{% endfor %}"
        (output,) = llm.chat(messages, GREEDY, chat_template=template, **QUIET)
        assert output.prompt == mark + "Hello"
    with pytest.raises(RequestError, match="unsafe"):
        llm.chat(messages, GREEDY, chat_template="{{ ''.__class__.__mro__ }}", **QUIET)
    with pytest.raises(RequestError, match="mm_processor_kwargs"):
        llm.chat(messages, GREEDY, mm_processor_kwargs={}, **QUIET)


def test_params_that_change_after_a_call_change_later_calls_alone(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    params.temperature, params.max_tokens = 0.0, 3
    streamed = llm.stream("coffee", params)
    first = next(streamed)
    params.max_tokens = 1

    rest = list(streamed)
    (short,) = llm.generate("coffee", params, **QUIET)

    assert len(first.token_ids) + sum(len(delta.token_ids) for delta in rest) == 3
    assert len(short.outputs[0].token_ids) == 1


def test_stream_gives_the_text_piece_by_piece(llm: LLM) -> None:
    (whole,) = llm.generate("stream", GREEDY, **QUIET)

    pieces = list(llm.stream("stream", GREEDY))

    assert "".join(piece.text for piece in pieces) == whole.outputs[0].text
    assert pieces[-1].finish_reason == "length"
    assert len(pieces) > 1


def test_stream_that_is_closed_ends_its_request(llm: LLM) -> None:
    pieces = llm.stream("stream", GREEDY.with_values(max_tokens=50))
    next(pieces)

    pieces.close()  # type: ignore[attr-defined]

    assert not llm.engine.has_unfinished()


def test_progress_bar_counts_prompts_and_tokens(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate(["a", "b"], GREEDY)

    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown
    assert "2/2" in shown
    assert "output: " in shown
    assert "tok/s" in shown


def test_no_progress_bar_unless_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY, **QUIET)

    assert capsys.readouterr().err == ""


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "empty text": ("", GREEDY, "empty"),
    "empty ids": ([[]], GREEDY, "empty"),
    "too long": ("x" * 300, GREEDY, "context"),
    "negative id": ([[1, -1]], GREEDY, "-1"),
    "id outside the vocabulary": ([[256]], GREEDY, "256"),
    "huge id": ([[2**40]], GREEDY, str(2**40)),
    "truth value as id": ([[True]], GREEDY, "token ids"),
    "a number": (5, GREEDY, "allowed"),
    "nothing": (None, GREEDY, "allowed"),
    "unknown key": ({"promt": "x"}, GREEDY, "promt"),
    "text beside a bad prompt": (["fine", [999]], GREEDY, "999"),
    "too few params": (["a", "b"], [GREEDY], "1 sampling_params for 2"),
    "params of another type": ("a", [{"n": 1}], "SamplingParams"),
    "stop token outside": ("a", GREEDY.with_values(stop_token_ids=[999]), "stop_token_ids"),
}


@pytest.mark.parametrize(("prompts", "params", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_call_is_refused_before_anything_runs(
    llm: LLM, prompts: Any, params: Any, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        llm.generate(prompts, params, **QUIET)


def test_priorities_are_refused_under_fcfs_and_counted(llm: LLM) -> None:
    with pytest.raises(RequestError, match="scheduling policy is fcfs"):
        llm.generate(["a"], GREEDY, priority=[1], **QUIET)
    with pytest.raises(RequestError, match="2 priorities for 1 prompts"):
        llm.generate(["a"], GREEDY, priority=[0, 0], **QUIET)


def test_interruption_leaves_no_request_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = llm.engine.step
    count = iter(range(3))

    def interrupted() -> Any:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return steps()

    monkeypatch.setattr(llm.engine, "step", interrupted)

    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c"] * 5, GREEDY.with_values(max_tokens=50), **QUIET)


def test_request_that_fails_is_warned_about_and_the_others_are_served(folder: Path) -> None:
    llm = LLM(str(folder), **OPTIONS)
    llm.engine.runner.model.model.embed_tokens.weight.data[9] = float("nan")
    clean, _ = llm.generate([[1, 2, 3], [4, 5]], GREEDY.with_values(max_tokens=1), **QUIET)

    with pytest.warns(UserWarning, match="not finite"):
        good, bad = llm.generate([[1, 2, 3], [4, 9]], GREEDY.with_values(max_tokens=1), **QUIET)

    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].token_ids == []
    assert good.outputs[0].token_ids == clean.outputs[0].token_ids
    assert has_all_blocks(llm.engine)


def test_dead_engine_answers_every_later_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(folder), **OPTIONS)

    def fail(output: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(llm.engine.runner, "dispatch", fail)

    with pytest.raises(EngineDeadError, match="boom"):
        llm.generate([[1]], GREEDY, **QUIET)
    with pytest.raises(EngineDeadError):
        llm.generate([[1]], GREEDY, **QUIET)


def test_unknown_option_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'max_num_seqs'"):
        LLM(str(folder), max_num_seq=3)


def test_keywords_of_vllms_that_ask_for_nothing_are_taken_and_others_refused(folder: Path) -> None:
    llm = LLM(
        str(folder),
        **OPTIONS,
        pipeline_parallel_size=1,
        disable_log_stats=True,
        enable_chunked_prefill=True,
        swap_space=4,
    )

    assert llm.generate([1, 2], GREEDY, **QUIET)[0].finished
    for name, value in (("pipeline_parallel_size", 2), ("enable_lora", True), ("runner", "draft")):
        with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
            LLM(str(folder), **{name: value})


def test_model_without_a_tokenizer_takes_ids_and_refuses_text(folder: Path) -> None:
    llm = LLM(str(folder), **OPTIONS)

    (output,) = llm.generate([[1, 2]], GREEDY, **QUIET)

    assert len(output.outputs[0].token_ids) == 8
    assert output.outputs[0].text == ""
    with pytest.raises(RequestError, match="token ids"):
        llm.generate("text", GREEDY, **QUIET)
    with pytest.raises(ConfigError, match="tokenizer"):
        llm.get_tokenizer()


def test_dummy_weights_need_no_more_than_a_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())

    with pytest.warns(UserWarning, match=r"tokenizer\.json: no such file"):
        llm = LLM(str(tmp_path), load_format="dummy", **{**OPTIONS, "skip_tokenizer_init": False})
    found = llm.generate([3, 4, 5], GREEDY, **QUIET)[0].outputs[0]

    assert (len(found.token_ids), found.text) == (8, "")
    with pytest.raises(RequestError, match="there is no tokenizer; give token ids"):
        llm.generate("text", GREEDY, **QUIET)
