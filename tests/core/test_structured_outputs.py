"""Answers keep to the form that was asked for, whatever else is in the batch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny_llama
from replaying import ReplayingCapture
from schema_cases import SchemaMaker
from tiny_llama import OPTIONS, has_all_blocks

from quire import LLM, SamplingParams
from quire.errors import RequestError
from quire.execution.in_flight import Forwarded, InFlight
from quire.interfaces.attention import GraphSupport
from quire.interfaces.grammar import GrammarStuck
from quire.start import STEPS_IN_FLIGHT, Starter
from quire_attention.reference.backend import ReferenceAttention
from quire_sampling.reference.sampler import ReferenceSampler

QUIET: dict[str, Any] = {"use_tqdm": False}
END = 256
PAIR = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"json": PAIR},
    {"regex": "[a-f]{3}-[0-9]{2}"},
    {"choice": ["yes", 'quo"te\n', "ünï \\d"]},
    {"grammar": 'start: "<" item{1,3} ">"\nitem: "p" | "q" "r"?'},
    {"grammar": 'root ::= "<" item{1,3} ">"\nitem ::= "p" | "q" "r"?'},
    {
        "structural_tag": {
            "format": {
                "type": "tag",
                "begin": "<",
                "content": {"type": "json_schema", "json_schema": {"enum": ["p", "qr"]}},
                "end": ">",
            }
        }
    },
]


def keeps(form: dict[str, Any], text: str) -> bool:
    """Judge a text without a grammar engine."""
    kind, value = next(iter(form.items()))
    if kind == "json":
        return jsonschema.Draft202012Validator(value).is_valid(json.loads(text))
    if kind == "choice":
        return text in value
    if kind == "structural_tag":
        return re.fullmatch(r'<\s*"(p|qr)"\s*>', text) is not None
    pattern = value if kind == "regex" else r"<(p|qr?){1,3}>"
    return re.fullmatch(pattern, text) is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama.write_folder(folder, vocab_size=260, eos_token_id=END, max_position_embeddings=2048)
    return tiny_llama.write_tokenizer(folder)


def start(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{**OPTIONS, "skip_tokenizer_init": False, **options})


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[LLM]:
    llm = start(folder)
    yield llm
    llm.frontend.close()


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared LLM; afterwards no request, block or matcher is left."""
    yield shared
    assert not shared.engine.has_unfinished()
    assert has_all_blocks(shared.engine)


def drawn(form: dict[str, Any] | None = None, **values: Any) -> SamplingParams:
    given = {"temperature": 1.0, "max_tokens": 150, "seed": 5, **values}
    return SamplingParams(**given, structured_outputs=form)


def check_schemas(llm: LLM, seeds: range, prompt: str, *, max_tokens: int = 600) -> int:
    """Generate for one schema a seed; return how many answers ended by themselves."""
    schemas = [SchemaMaker(seed).make() for seed in seeds]
    params = [drawn({"json": s}, seed=i, max_tokens=max_tokens) for i, s in enumerate(schemas)]
    outputs = llm.generate([prompt] * len(schemas), params, **QUIET)
    num_ended = 0
    for schema, output in zip(schemas, outputs, strict=True):
        answer = output.outputs[0]
        assert answer.finish_reason in ("stop", "length"), schema
        if answer.finish_reason == "stop":
            num_ended += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
    return num_ended


def test_answers_of_40_schemas_parse_and_validate(llm: LLM) -> None:
    assert check_schemas(llm, range(40), "a") > 28


@pytest.mark.slow
def test_answers_of_1000_schemas_parse_and_validate(llm: LLM) -> None:
    assert check_schemas(llm, range(1000, 2000), "b") > 750


@pytest.mark.slow
def test_answers_of_1000_schemas_of_the_demo_parse_and_validate() -> None:
    llm = LLM("demo", max_num_seqs=64)

    assert check_schemas(llm, range(3000, 4000), "What would you like?", max_tokens=150) > 400

    llm.frontend.close()


def test_each_form_is_compiled_once_and_begun_when_it_was_checked(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.generate("a", drawn({"regex": "[ab]{2}"}), **QUIET)  # the grammar engine is loaded
    assert llm.engine._grammars._compiler is not None
    engine, compiled, begun = llm.engine._grammars._compiler.engine(), [], []
    compile_one, begin = engine.compile, llm.engine.begin_grammar
    monkeypatch.setattr(engine, "compile", lambda one: compiled.append(one) or compile_one(one))
    monkeypatch.setattr(llm.engine, "begin_grammar", lambda *a: begun.append(a[0]) or begin(*a))
    params = [drawn({"regex": f"[ab]{{2}}{i % 5}"}) for i in range(10)]

    llm.generate(["a"] * 10, params, **QUIET)

    sources = {one.structured_outputs.source for one in params if one.structured_outputs}
    assert len(compiled) == len(begun) == len(sources) == 5
    assert set(compiled) == set(begun) == sources


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_kind_of_form_is_kept_by_each_of_several_answers(
    llm: LLM, form: dict[str, Any], temperature: float
) -> None:
    n = 3 if temperature else 1

    output = llm.generate("abc", drawn(form, n=n, temperature=temperature), **QUIET)[0]

    # A greedy answer may fill its object with spaces until it is cut.
    ended = [o.text for o in output.outputs if o.finish_reason == "stop"]
    assert len(ended) == n
    assert all(keeps(form, text) for text in ended)


def test_any_object_parses(llm: LLM) -> None:
    outputs = llm.generate(["x"] * 16, drawn({"json_object": True}, seed=None), **QUIET)

    ended = [o.outputs[0].text for o in outputs if o.outputs[0].finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def mixed() -> tuple[list[str], list[SamplingParams]]:
    """Return prompts and parameters, with and without forms in turn."""
    forms = [None, *FORMS, None, *FORMS]
    params = [
        drawn(form, seed=i, max_tokens=40, presence_penalty=0.1 * (i % 3), logprobs=i % 2)
        for i, form in enumerate(forms)
    ]
    return [f"prompt {i} " * (1 + i) for i in range(len(forms))], params


def tokens_of(llm: LLM) -> list[list[int]]:
    prompts, params = mixed()
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params, **QUIET)]


@pytest.fixture(scope="module")
def alone(shared: LLM) -> list[list[int]]:
    """The answers of the mixed requests, one at a time."""
    prompts, params = mixed()
    return [
        shared.generate(prompt, own, **QUIET)[0].outputs[0].token_ids
        for prompt, own in zip(prompts, params, strict=True)
    ]


def test_each_row_of_a_mixed_batch_equals_the_row_alone(llm: LLM, alone: list[list[int]]) -> None:
    assert tokens_of(llm) == alone


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16},
        {"kv_cache_memory_bytes": 45_000, "max_model_len": 160},
        {"enable_prefix_caching": False},
    ],
    ids=["plain", "chunked", "preempted", "no prefix cache"],
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_rows_are_the_same_with_steps_in_flight_and_chunks_and_preemption(
    folder: Path,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    depth: int,
) -> None:
    monkeypatch.setitem(STEPS_IN_FLIGHT, "cpu", depth)
    llm = start(folder, **options)

    found = tokens_of(llm)

    assert found == alone
    assert has_all_blocks(llm.engine)
    assert ("max_model_len" in options) == (llm.engine.scheduler.num_preemptions > 0)
    llm.frontend.close()


def test_a_limited_row_is_in_both_steps_in_flight(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEPS_IN_FLIGHT, "cpu", 2)
    llm = start(folder)
    engine, seen, order = llm.engine, [], []
    schedule, collect, sample = engine.schedule, engine.collect, engine.runner.sample
    begin = engine.runner.begin_masks

    def watched() -> Any:
        output = schedule()
        if output is not None:
            order.append(("planned", output.step_id))
            seen.append((engine.scheduler.num_steps_in_flight, len(output.num_scheduled_tokens)))
        return output

    def collected(step: InFlight) -> Any:
        order.append(("collected", step.step_id))
        return collect(step)

    def sampled(forwarded: Forwarded) -> InFlight:
        order.append(("sampled", forwarded.step_id))
        return sample(forwarded)

    def begun(forwarded: Forwarded) -> None:
        order.append(("begun", forwarded.step_id))
        begin(forwarded)

    monkeypatch.setattr(engine, "schedule", watched)
    monkeypatch.setattr(engine, "collect", collected)
    monkeypatch.setattr(engine.runner, "begin_masks", begun)
    monkeypatch.setattr(engine.runner, "sample", sampled)
    params = [drawn(None, max_tokens=12), drawn({"regex": "[ab]{11}"}, max_tokens=12)]
    llm.generate(["p", "q"], params, **QUIET)

    assert (2, 2) in seen
    # Its masks are those of the token before: they are begun when that was collected, and filled
    # while the next step is planned.
    steps = [step for what, step in order if what == "sampled"]
    for step in steps[1:8]:
        wanted = [("collected", step - 1), ("begun", step), ("planned", step + 1)]
        places = [order.index(one) for one in [*wanted, ("sampled", step)]]
        assert places == sorted(places)
    # A step that waits for its end when its only request is aborted ends too.
    asked = drawn({"regex": "[ab]{11}"}, max_tokens=12)
    engine.add_request(llm.frontend.inputs.process("p", asked, request_id="aborted"))
    for _ in range(3):
        engine.step()
    assert engine._late is not None
    engine.abort("aborted")
    engine.step()
    assert not engine.has_unfinished()
    assert has_all_blocks(engine)
    llm.frontend.close()


@pytest.mark.parametrize("support", [GraphSupport.SINGLE_TOKEN, GraphSupport.ANY])
def test_rows_are_the_same_in_captured_steps(
    folder: Path,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    support: GraphSupport,
) -> None:
    capture = ReplayingCapture()
    monkeypatch.setattr(ReferenceAttention, "graph_support", support)
    monkeypatch.setattr(Starter, "_capture", lambda *_: capture)
    monkeypatch.setattr(ReferenceSampler, "capturable", True)
    monkeypatch.setitem(STEPS_IN_FLIGHT, "cpu", 2)
    llm = start(folder, attention_backend="reference")
    capture.last_tokens = llm.engine.runner._builder.last_tokens

    assert tokens_of(llm) == alone
    assert capture.num_replays > 0
    llm.frontend.close()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_with_nothing_but_forms_end_in_captured_steps_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, depth: int, temperature: float
) -> None:
    capture = ReplayingCapture()
    monkeypatch.setattr(ReferenceAttention, "graph_support", GraphSupport.ANY)
    monkeypatch.setattr(ReferenceSampler, "capturable", True)
    monkeypatch.setitem(STEPS_IN_FLIGHT, "cpu", depth)
    forms = [*FORMS, None, {"regex": "[ab]{30}"}]
    params = [
        drawn(form, seed=i, max_tokens=30, temperature=temperature) for i, form in enumerate(forms)
    ]
    prompts = [f"p{i} " * (i + 1) for i in range(len(forms))]
    found = []
    for capture_steps in (False, True):
        if capture_steps:
            monkeypatch.setattr(Starter, "_capture", lambda *_: capture)
        llm = start(folder, attention_backend="reference")
        capture.last_tokens = llm.engine.runner._builder.last_tokens
        outputs = llm.generate(prompts, params, **QUIET)
        found.append([output.outputs[0].token_ids for output in outputs])
        llm.frontend.close()

    assert found[0] == found[1]
    graphs = llm.engine.runner.decode_graphs
    assert graphs is not None
    assert any(is_end for _, _, is_end in graphs._captured)


def test_a_stream_gives_the_text_of_the_whole(llm: LLM) -> None:
    params = drawn({"json": PAIR})
    whole = llm.generate("s", params, **QUIET)[0].outputs[0].text

    assert "".join(delta.text for delta in llm.stream("s", params)) == whole


def test_a_stop_string_ends_an_answer_within_a_regex(llm: LLM) -> None:
    answer = llm.generate("s", drawn({"regex": "ab+c"}, stop="b"), **QUIET)[0].outputs[0]

    assert (answer.text, answer.finish_reason) == ("a", "stop")


def test_max_tokens_cuts_an_answer_and_says_so(llm: LLM) -> None:
    answer = llm.generate("s", drawn({"regex": "[ab]{50}"}, max_tokens=5), **QUIET)[0].outputs[0]

    assert re.fullmatch("[ab]{5}", answer.text)
    assert answer.finish_reason == "length"


def test_logprobs_are_of_the_models_own_logits(llm: LLM) -> None:
    free = llm.generate("s", drawn(None, logprobs=20, max_tokens=1), **QUIET)[0].outputs[0]
    limited = llm.generate("s", drawn({"choice": ["k"]}, logprobs=20, max_tokens=1), **QUIET)[
        0
    ].outputs[0]

    def most_likely(entry: dict[int, Any]) -> list[float]:
        return sorted((e.logprob for e in entry.values() if (e.rank or 99) <= 20), reverse=True)

    assert most_likely(limited.logprobs[0]) == pytest.approx(most_likely(free.logprobs[0]))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ignore_eos": True}, "ignore_eos"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"beam_search": {"beam_width": 2}}, "beam search"),
        ({"stop": "x"}, "stop"),
        ({"stop_token_ids": [4]}, "stop"),
    ],
)
def test_contradictions_are_refused(llm: LLM, values: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        llm.generate("s", drawn({"json": PAIR}, **values), **QUIET)

    assert caught.value.parameter == "structured_outputs"


def test_a_matcher_that_fails_ends_its_own_row_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quire_grammar.llguidance import engine

    fill, calls = engine._Matcher.fill_masks, []

    def failing(_: type, matchers: list[Any], masks: Any) -> Any:
        calls.append(matchers[0])
        raised = fill(matchers, masks)
        if len(calls) > 4 and calls[0] in matchers:
            raised[matchers.index(calls[0])] = GrammarStuck("a limit was met")
        return raised

    monkeypatch.setattr(engine._Matcher, "fill_masks", classmethod(failing))
    params = [drawn({"regex": "[ab]{12}"}), drawn({"regex": "[cd]{12}"}), drawn(None, max_tokens=9)]
    with pytest.warns(UserWarning, match="the grammar cannot go on: a limit was met"):
        outputs = llm.generate(["p", "q", "r"], params, **QUIET)

    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert sorted(reasons[:2]) == ["error", "stop"]
    assert len(outputs[2].outputs[0].token_ids) == 9
    assert not llm.engine.runner.grammars.asks([0, 1, 2]) or not llm.engine.has_unfinished()


def test_parameters_that_leave_a_form_no_token_at_its_begin_are_refused(llm: LLM) -> None:
    forbidden = llm.get_tokenizer().encode("ab")

    for values in ({"forbidden_token_ids": forbidden}, {"allowed_token_ids": [0, 1]}):
        with pytest.raises(RequestError, match="contradicts itself: allowed_token_ids") as caught:
            llm.generate("p", drawn({"regex": "[ab]{3}"}, **values), **QUIET)
        assert caught.value.parameter == "structured_outputs"


def test_parameters_that_leave_a_form_no_token_later_fail_alone(llm: LLM) -> None:
    forbidden = llm.get_tokenizer().encode("b")
    params = [
        drawn({"regex": "a{3}b"}, forbidden_token_ids=forbidden),
        drawn({"regex": "[ab]{3}"}, forbidden_token_ids=forbidden),
    ]
    with pytest.warns(UserWarning, match="contradicts itself: allowed_token_ids"):
        outputs = llm.generate(["p", "q"], params, **QUIET)

    assert [o.outputs[0].finish_reason for o in outputs] == ["error", "stop"]
    assert outputs[1].outputs[0].text == "aaa"


def test_a_request_that_is_aborted_leaves_nothing(llm: LLM) -> None:
    stream = llm.stream("s", drawn({"regex": "[ab]{100}"}))
    next(stream)
    stream.close()

    llm.generate("t", drawn(None, max_tokens=2), **QUIET)

    assert llm.engine.runner.grammars._matchers == {}
