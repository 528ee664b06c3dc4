"""One layer turns what a user gives into a Request, or says in one sentence what is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.errors import RequestError
from quire.request import Request, SamplingParams
from quire.text.input_processor import (
    ContextLengthError,
    InputProcessor,
    RenderedChat,
    RequestLimits,
    prompt_text,
)
from quire.text.tokenizer import Tokenizer

RELAXED = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40
)
VOCAB = 400
CONTEXT = 32
Process = Callable[..., Request]


@pytest.fixture(scope="module")
def gpt2(tokenizer_of: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_of("gpt2")


def build(tokenizer: Tokenizer | None, **limits: Any) -> InputProcessor:
    values = {"max_model_len": CONTEXT, "vocab_size": VOCAB, **limits}
    return InputProcessor(RequestLimits(**values), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def process(gpt2: Tokenizer) -> Process:
    processor = build(gpt2, eos_token_ids=frozenset({0, 7}))

    def run(prompt: Any, *, params: SamplingParams | None = None, **values: Any) -> Request:
        return processor.process(
            prompt, params or SamplingParams(), **{"request_id": "r", **values}
        )

    return run


@pytest.mark.parametrize("wrap", [str, lambda text: {"prompt": text}])
def test_text_is_tokenized(wrap: Any, process: Process, gpt2: Tokenizer) -> None:
    assert process(wrap("hello")).prompt_token_ids == tuple(gpt2.encode("hello"))


@pytest.mark.parametrize(
    "prompt",
    [[1, 2], (1, 2), {"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [1, 2], "prompt": "x"}],
)
def test_token_ids_are_taken_as_they_are(prompt: Any, process: Process) -> None:
    assert process(prompt).prompt_token_ids == (1, 2)


def test_a_rendered_chat_gets_the_begin_token_once(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    tokenizer = tokenizer_of("llama3")
    processor = build(tokenizer, vocab_size=500)

    request = processor.process(
        RenderedChat("<|begin_of_text|>hi"), SamplingParams(), request_id="r"
    )

    assert request.prompt_token_ids.count(0) == 1


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a", "a"),
        ({"prompt": "a"}, "a"),
        ([1], None),
        (RenderedChat("a"), "a"),
        ({"prompt_token_ids": [1], "prompt": "a"}, "a"),
    ],
)
def test_the_text_of_a_prompt_is_kept_where_there_is_one(prompt: Any, text: str | None) -> None:
    assert prompt_text(prompt) == text


@pytest.mark.parametrize(
    ("asked", "given_tokens"), [(None, CONTEXT - 2), (5, 5), (10**9, CONTEXT - 2)]
)
def test_max_tokens_is_at_most_what_the_context_leaves(
    asked: int | None, given_tokens: int, process: Process
) -> None:
    assert process([1, 2], params=SamplingParams(max_tokens=asked)).max_tokens == given_tokens


def test_the_longest_prompt_that_fits_leaves_one_token(process: Process) -> None:
    assert process([1] * (CONTEXT - 1)).max_tokens == 1


def test_end_tokens_and_stop_tokens_are_united(process: Process) -> None:
    request = process([1], params=SamplingParams(stop_token_ids=[5]))

    assert request.eos_token_ids == {0, 7}
    assert request.stop_token_ids == {0, 5, 7}


def test_end_tokens_are_left_out_when_ignored(process: Process) -> None:
    request = process([1], params=SamplingParams(stop_token_ids=[5], ignore_eos=True))

    assert request.eos_token_ids == frozenset()
    assert request.stop_token_ids == {5}


def test_end_tokens_that_the_model_does_not_have_are_left_out(gpt2: Tokenizer) -> None:
    processor = build(gpt2, eos_token_ids=frozenset({3, VOCAB, 10**9}))

    request = processor.process([1], SamplingParams(), request_id="r")

    assert request.stop_token_ids == {3}


def test_seeds_are_drawn_in_the_same_order_for_the_same_start(gpt2: Tokenizer) -> None:
    seeds = [
        [p.process([1], SamplingParams(), request_id="r").seed for _ in range(4)]
        for p in (build(gpt2), build(gpt2))
    ]

    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 4


def test_a_given_seed_is_kept(process: Process) -> None:
    assert process([1], params=SamplingParams(seed=-5)).seed == -5


def test_priority_and_salt_reach_the_request(gpt2: Tokenizer) -> None:
    processor = build(gpt2, has_priorities=True)

    request = processor.process(
        [1], SamplingParams(), request_id="r", priority=-3, cache_salt="s", arrival_s=2.5
    )

    assert (request.priority, request.cache_salt, request.arrival_s) == (-3, "s", 2.5)


def test_the_salt_may_come_with_the_prompt_as_in_vllm(process: Process) -> None:
    assert process({"prompt": "a", "cache_salt": "s"}).cache_salt == "s"


TOO_LONG = "x" * 10_000_000
BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "none": (None, "prompt is a NoneType"),
    "number": (5, "prompt is a int"),
    "empty_text": ("", "prompt is empty"),
    "empty_ids": ([], "prompt is empty"),
    "empty_object": ({}, "neither text nor token ids"),
    "text_number": ({"prompt": 5}, "prompt is a int"),
    "ids_text": ({"prompt_token_ids": "12"}, "prompt_token_ids is a str"),
    "image": ({"prompt": "a", "multi_modal_data": {"image": 1}}, "'multi_modal_data'"),
    "surrogate": ("a\ud83d", "surrogate"),
    "negative": ([1, -1], "prompt has -1 at position 1"),
    "vocab": ([1, VOCAB], f"prompt has {VOCAB} at position 1; allowed: token ids from 0 to 399"),
    "huge_id": ([2**70], "at position 0"),
    "digits": ([10**4000], "at position 0"),
    "bool": ([True, False], "prompt has True at position 0"),
    "float": ([1.0], "prompt has 1.0 at position 0"),
    "nested": ([[1]], "prompt has [1] at position 0"),
    "texts": (["a"], "prompt has 'a' at position 0"),
    "null_id": ([None], "prompt has None"),
    "context": ([1] * CONTEXT, f"prompt has {CONTEXT} tokens, but the context is {CONTEXT}"),
    "many_ids": ([1] * 5_000_000, "prompt has 5000000 tokens"),
    "long_text": (TOO_LONG, "prompt has 10000000 characters"),
    "long_chat": (RenderedChat(TOO_LONG), "prompt has 10000000 characters"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_is_refused_at_once_without_echoing_it(name: str, process: Process) -> None:
    prompt, said = BAD_PROMPTS[name]
    start = time.process_time()

    with pytest.raises(RequestError) as error:
        process(prompt)

    assert time.process_time() - start < 0.5
    assert error.value.parameter == "prompt"
    assert said in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["context", "many_ids", "long_text", "long_chat"])
def test_a_prompt_that_leaves_no_room_is_its_own_kind_of_error(name: str, process: Process) -> None:
    with pytest.raises(ContextLengthError, match="raise --max-model-len"):
        process(BAD_PROMPTS[name][0])


def test_a_million_bad_ids_are_refused_in_milliseconds(gpt2: Tokenizer) -> None:
    processor = build(gpt2, max_model_len=2**30)
    ids = [-1] * 1_000_000
    start = time.process_time()

    with pytest.raises(RequestError, match="prompt has -1 at position 0"):
        processor.process(ids, SamplingParams(), request_id="r")

    assert time.process_time() - start < 0.2


BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "salt_empty": ({"cache_salt": ""}, "cache_salt"),
    "salt_long": ({"cache_salt": "x" * 129}, "cache_salt"),
    "salt_number": ({"cache_salt": 5}, "cache_salt"),
    "priority_huge": ({"priority": 2**70}, "priority"),
    "priority_float": ({"priority": 1.5}, "priority"),
    "priority_bool": ({"priority": True}, "priority"),
    "priority_policy": ({"priority": 5}, "priority"),
    "id_empty": ({"request_id": ""}, "request_id"),
    "id_long": ({"request_id": "x" * 100_000}, "request_id"),
    "id_control": ({"request_id": "a\nb"}, "request_id"),
    "stop_id": ({"params": SamplingParams(stop_token_ids=[VOCAB])}, "stop_token_ids"),
    "stop_id_huge": ({"params": SamplingParams(stop_token_ids=[2**70])}, "stop_token_ids"),
    "bias_id": ({"params": SamplingParams(logit_bias={VOCAB: 1})}, "logit_bias"),
    "bias_id_huge": ({"params": SamplingParams(logit_bias={2**70: 1})}, "logit_bias"),
    "params": ({"params": {"temperature": 1}}, "sampling_params"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_refused_by_the_name_of_its_parameter(name: str, process: Process) -> None:
    values, parameter = BAD_VALUES[name]

    with pytest.raises(RequestError) as error:
        process([1], **values)

    assert error.value.parameter == parameter
    assert len(str(error.value)) < 300


def test_without_a_tokenizer_only_token_ids_are_taken() -> None:
    processor = build(None)

    assert processor.process([1], SamplingParams(), request_id="r").prompt_token_ids == (1,)
    with pytest.raises(RequestError, match="no tokenizer"):
        processor.process("a", SamplingParams(), request_id="r")
    with pytest.raises(RequestError, match="stop strings"):
        processor.process([1], SamplingParams(stop=["a"]), request_id="r")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["prompt", "prompt_token_ids", "x"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@RELAXED
@given(prompt=anything | st.lists(st.integers(-2, VOCAB + 2), max_size=CONTEXT + 2))
def test_any_prompt_gives_a_request_that_cannot_fail_or_a_request_error(
    prompt: Any, process: Process
) -> None:
    try:
        request = process(prompt)
    except RequestError as error:
        refusal = (error.parameter, len(str(error)) < 400)
    else:
        ids = request.prompt_token_ids
        refusal = ("prompt", all(type(i) is int and 0 <= i < VOCAB for i in ids))
        assert 0 < len(ids) < len(ids) + request.max_tokens <= CONTEXT
    assert refusal == ("prompt", True)


def forms_of(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Return the tokens of a word without and with a space, in vLLM's order."""
    texts = (word.lstrip(), " " + word.lstrip())
    return [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


@pytest.mark.parametrize("words", [["coffee"], [" hello", "the"], ["a b", "zq?", "over"]])
def test_bad_words_are_tokens_with_and_without_a_space(
    words: list[str], tokenizer: Tokenizer
) -> None:
    processor = build(tokenizer, vocab_size=1000)

    request = processor.process([5], SamplingParams(bad_words=words), request_id="r")

    found = request.bad_words_token_ids
    for word in words:
        bare, spaced = forms_of(word, tokenizer)
        assert bare in found
        if len(spaced) == len(bare) and spaced[0] != bare[0]:  # vLLM's condition
            assert spaced in found
        # Whichever form is said, one that is looked for ends it.
        assert any(spaced[-len(one) :] == one for one in found)
    assert set(found) <= {form for word in words for form in forms_of(word, tokenizer)}


def test_a_word_that_begins_with_its_space_is_found_in_both_forms(gpt2: Tokenizer) -> None:
    params = SamplingParams(bad_words=["coffee"])

    found = build(gpt2).process([5], params, request_id="r").bad_words_token_ids

    assert {gpt2.decode(word) for word in found} == {"coffee", " coffee"}


@pytest.mark.parametrize(
    ("values", "parameter"),
    [
        ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
        ({"allowed_token_ids": [2**70]}, "allowed_token_ids"),
        ({"forbidden_token_ids": [5, VOCAB]}, "forbidden_token_ids"),
        ({"forbidden_token_ids": range(VOCAB)}, "forbidden_token_ids"),
        ({"allowed_token_ids": [0, 7], "min_tokens": 2}, "min_tokens"),
        ({"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 1}, "min_tokens"),
        ({"forbidden_token_ids": range(8, VOCAB), "bad_words": ["x" * 99]}, "bad_words"),
        ({"bad_words": ["\ud800"]}, "bad_words"),
        ({"truncate_prompt_tokens": CONTEXT + 1}, "truncate_prompt_tokens"),
    ],
)
def test_bans_and_lengths_that_cannot_be_served_are_refused(
    values: dict[str, Any], parameter: str, process: Process
) -> None:
    values = {k: list(v) if isinstance(v, range) else v for k, v in values.items()}

    with pytest.raises(RequestError) as caught:
        process([5], params=SamplingParams(**values))

    assert caught.value.parameter == parameter


def test_bad_words_that_may_take_the_last_token_are_refused(gpt2: Tokenizer) -> None:
    (token_id,) = gpt2.encode("a")
    params = SamplingParams(allowed_token_ids=[token_id], bad_words=["ba"])

    with pytest.raises(RequestError, match="bad_words may leave no token to generate"):
        build(gpt2).process([5], params, request_id="r")


def test_bad_words_need_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="bad_words need a tokenizer"):
        build(None).process([5], SamplingParams(bad_words=["a"]), request_id="r")


@pytest.mark.parametrize(("given", "kept"), [(1, 1), (3, 3), (CONTEXT, 31), (-1, 31)])
def test_of_a_long_prompt_the_last_tokens_are_kept(given: int, kept: int, process: Process) -> None:
    ids = [i % 300 for i in range(31 if given == CONTEXT else 500)]

    request = process(ids, params=SamplingParams(truncate_prompt_tokens=given))

    assert request.prompt_token_ids == tuple(ids[-kept:])


@pytest.mark.parametrize("given", [3, -1, None])
def test_short_prompt_is_kept_whole(given: int | None, process: Process) -> None:
    request = process([1, 2, 3], params=SamplingParams(truncate_prompt_tokens=given))

    assert request.prompt_token_ids == (1, 2, 3)


def test_prompt_that_is_cut_to_the_whole_context_leaves_no_room(process: Process) -> None:
    with pytest.raises(ContextLengthError):
        process([5] * 99, params=SamplingParams(truncate_prompt_tokens=CONTEXT))


def test_ids_that_are_cut_off_are_checked_too(process: Process) -> None:
    with pytest.raises(RequestError, match="at position 0"):
        process([VOCAB, *[5] * 9], params=SamplingParams(truncate_prompt_tokens=2))


@pytest.mark.parametrize("length", [1, 4])
def test_text_that_is_cut_keeps_its_begin_token_as_transformers(
    length: int, tokenizer_of: Callable[[str], Tokenizer], folder_of: Callable[[str], Any]
) -> None:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(folder_of("llama3"), truncation_side="left")
    text = "The quick brown fox jumps over the lazy dog."
    processor = build(tokenizer_of("llama3"), vocab_size=1000)

    params = SamplingParams(truncate_prompt_tokens=length)
    request = processor.process(text, params, request_id="r")

    want = oracle(text, truncation=True, max_length=length).input_ids
    assert list(request.prompt_token_ids) == want


@pytest.mark.parametrize("logprobs", [None, 3])
def test_best_of_asks_the_engine_for_all_sequences_and_their_logprobs(
    logprobs: int | None, process: Process
) -> None:
    request = process([5], params=SamplingParams(n=2, best_of=5, logprobs=logprobs))

    assert (request.params.n, request.params.logprobs) == (5, logprobs or 0)
    assert (request.num_best, request.hides_logprobs) == (2, logprobs is None)


def test_best_of_as_many_as_are_returned_chooses_nothing(process: Process) -> None:
    request = process([5], params=SamplingParams(n=2, best_of=2))

    assert (request.params.n, request.num_best, request.params.logprobs) == (2, None, None)
