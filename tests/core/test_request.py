"""SamplingParams: what is allowed, what is refused by name, and what vLLM's scripts pass."""

from __future__ import annotations

import math
from typing import Any

import pytest

from quire import SamplingParams
from quire.errors import RequestError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 1.0),
        ("n", 129),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        pytest.param("n", 10**5000, id="n-huge"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop_token_ids", [-5]),
        ("stop_token_ids", [True]),
        ("ignore_eos", 1),
        ("extra_args", []),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", True),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-30),
        ("repetition_penalty", 1e30),
        ("repetition_penalty", "x"),
        ("logprobs", 21),
        ("logprobs", -2),
        ("logprobs", True),
        ("prompt_logprobs", 10**6),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {True: 1}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: math.inf}),
        ("logit_bias", {5: 1e9}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {5: None}),
        ("logit_bias", {"5": 1, 5: 2}),
        ("logit_bias", {"9" * 400: 1}),
        ("logit_bias", [1]),
        ("logit_bias", 0),
        ("best_of", 0),
        ("best_of", 129),
        ("best_of", 2.0),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", [1, True]),
        ("allowed_token_ids", 5),
        ("allowed_token_ids", [0] * (2**18 + 1)),
        ("forbidden_token_ids", ["1"]),
        ("forbidden_token_ids", [1.0]),
        ("forbidden_token_ids", [0] * (2**18 + 1)),
        ("bad_words", [""]),
        ("bad_words", [" \n"]),
        ("bad_words", [5]),
        ("bad_words", 5),
        ("bad_words", ["x" * 257]),
        ("bad_words", ["x"] * 257),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", True),
        ("truncate_prompt_tokens", "5"),
        ("spaces_between_special_tokens", 1),
    ],
)
def test_sampling_params_refuse_a_bad_value_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} is .*; allowed: ") as caught:
        SamplingParams(**{name: value})

    assert caught.value.parameter == name


@pytest.mark.parametrize(
    "values",
    [
        {"bad_words": []},
        {"bad_words": None, "allowed_token_ids": None, "truncate_prompt_tokens": None},
        {"extra_args": None},
        {"logit_bias": {}},
        {"stop": None},
        {"top_k": -1},
        {"forbidden_token_ids": None},
        {"best_of": 1},
    ],
)
def test_sampling_params_take_neutral_values_of_vllm(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)

    assert params.clone() == params
    assert params.extra_args == {}


def test_sampling_params_refuse_more_min_tokens_than_max_tokens() -> None:
    with pytest.raises(RequestError, match="min_tokens is 9; allowed: at most max_tokens, 8"):
        SamplingParams(min_tokens=9, max_tokens=8)


def test_sampling_params_refuse_fewer_sequences_than_are_returned() -> None:
    with pytest.raises(RequestError, match="best_of is 2; allowed: at least n, 3"):
        SamplingParams(n=3, best_of=2)


@pytest.mark.parametrize(("n", "best_of", "count"), [(2, None, 2), (2, 2, 2), (2, 5, 5)])
def test_as_many_sequences_are_generated_as_there_are_to_choose_from(
    n: int, best_of: int | None, count: int
) -> None:
    assert SamplingParams(n=n, best_of=best_of).num_sequences == count


def test_sampling_params_refuse_to_forbid_all_that_is_allowed() -> None:
    with pytest.raises(RequestError, match="forbidden_token_ids has all of allowed") as caught:
        SamplingParams(allowed_token_ids=[3, 4, 3], forbidden_token_ids=[5, 4, 3])

    assert caught.value.parameter == "forbidden_token_ids"


@pytest.mark.parametrize("temperature", [0, 1e-40])
def test_a_temperature_of_almost_nothing_is_greedy(temperature: float) -> None:
    assert SamplingParams(temperature=temperature).is_greedy


def test_bias_takes_the_ids_that_openais_clients_write_as_texts() -> None:
    assert SamplingParams(logit_bias={"5": 1, 7: -100}).logit_bias == {5: 1, 7: -100}


def test_all_ids_of_a_vocabulary_may_be_biased() -> None:
    bias = dict.fromkeys(range(4096), -100)

    assert SamplingParams(logit_bias=bias).logit_bias == bias


@pytest.mark.parametrize("values", [{}, {"logit_bias": {}}, {"logprobs": 0}])
def test_params_without_penalties_say_so(values: dict[str, Any]) -> None:
    assert not SamplingParams(**values).has_penalties


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_params_with_a_penalty_say_so(name: str) -> None:
    assert SamplingParams(**{name: 0.5}).has_penalties


def test_fields_that_are_set_later_are_checked_like_the_first() -> None:
    params = SamplingParams(max_tokens=8, min_tokens=2)

    params.temperature = 0.5
    params.stop = "\n"  # type: ignore[assignment]

    assert (params.temperature, params.stop) == (0.5, ("\n",))
    for name, value in (
        ("temperature", -1),
        ("top_p", math.nan),
        ("min_tokens", 9),
        ("max_tokens", 1),
        ("detokenize", False),
        ("best_of", 0),
        ("allowed_token_ids", []),
    ):
        before = getattr(params, name)
        with pytest.raises(RequestError):
            setattr(params, name, value)
        assert getattr(params, name) == before
