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
    ],
)
def test_sampling_params_refuse_a_bad_value_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} is .*; allowed: ") as caught:
        SamplingParams(**{name: value})

    assert caught.value.parameter == name


@pytest.mark.parametrize(
    ("name", "value"),
    [("presence_penalty", 0.5), ("logprobs", 1), ("bad_words", ["x"]), ("logit_bias", {1: 2.0})],
)
def test_sampling_params_refuse_by_name_what_is_not_honoured_yet(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} is not supported"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "values",
    [{"bad_words": []}, {"extra_args": None}, {"logit_bias": {}}, {"stop": None}, {"top_k": -1}],
)
def test_sampling_params_take_neutral_values_of_vllm(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)

    assert params.clone() == params
    assert params.extra_args == {}


def test_sampling_params_refuse_more_min_tokens_than_max_tokens() -> None:
    with pytest.raises(RequestError, match="min_tokens is 9; allowed: at most max_tokens, 8"):
        SamplingParams(min_tokens=9, max_tokens=8)


@pytest.mark.parametrize("temperature", [0, 1e-40])
def test_a_temperature_of_almost_nothing_is_greedy(temperature: float) -> None:
    assert SamplingParams(temperature=temperature).is_greedy
