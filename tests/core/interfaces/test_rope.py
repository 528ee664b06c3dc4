"""Rotary parameters: both spellings, every type, and errors that name file and key."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import LlamaConfig

from quire.errors import ConfigError
from quire.interfaces.rope import RopeParameters

TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16},
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 512,
    },
}


def read(given: dict[str, Any], **options: Any) -> RopeParameters:
    return RopeParameters.from_json({"max_position_embeddings": 2048, **given}, **options)


def old(rope_type: str, spelling: str, **more: Any) -> dict[str, Any]:
    return {"rope_theta": 5e5, "rope_scaling": {spelling: rope_type, **TYPES[rope_type]}, **more}


def new(rope_type: str) -> dict[str, Any]:
    entries = {"rope_theta": 5e5, "rope_type": rope_type, **TYPES[rope_type]}
    return {"rope_parameters": entries}


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize("rope_type", TYPES)
def test_rope_both_spellings_give_equal_parameters(rope_type: str, spelling: str) -> None:
    assert read(old(rope_type, spelling)) == read(new(rope_type))
    assert read(new(rope_type)).warnings == ()


@pytest.mark.parametrize("make", [new, lambda t: old(t, "type"), lambda t: old(t, "rope_type")])
@pytest.mark.parametrize("rope_type", TYPES)
def test_rope_parameters_equal_what_transformers_reads(rope_type: str, make: Any) -> None:
    oracle = LlamaConfig(max_position_embeddings=2048, **copy.deepcopy(make(rope_type)))
    expected = {k: v for k, v in oracle.rope_parameters.items() if k != "type"}
    parameters = read(make(rope_type))
    found = {name: getattr(parameters, name) for name in expected}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()} == expected


@pytest.mark.parametrize(
    ("given", "original"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 2048),
        (old("yarn", "type"), 1024),
        (old("yarn", "type", original_max_position_embeddings=256), 256),
    ],
    ids=["missing", "inside", "beside"],
)
def test_rope_original_length_is_resolved_as_transformers_does(
    given: dict[str, Any], original: int
) -> None:
    oracle = LlamaConfig(max_position_embeddings=2048, **copy.deepcopy(given))
    oracle.standardize_rope_params()  # as its rotary embedding does before it computes
    assert oracle.rope_parameters["original_max_position_embeddings"] == original
    assert read(given).original_max_position_embeddings == original


@pytest.mark.parametrize(
    ("given", "longest"),
    [
        ({}, 2048),
        (old("linear", "type"), 5120),
        (old("dynamic", "type"), 8192),
        (old("llama3", "rope_type"), 2048),
        (old("yarn", "type"), 4096),
        ({"rope_scaling": {"type": "yarn", "factor": 1.5}}, 3072),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, 2048),
    ],
)
def test_rope_longest_context_is_what_the_scaling_is_made_for(
    given: dict[str, Any], longest: int
) -> None:
    assert read(given).longest_context == longest


def scaled(**entries: Any) -> dict[str, Any]:
    return {"rope_scaling": {"type": "linear", "factor": 2.0, **entries}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rope_scaling": "linear"}, ["rope_scaling", '"linear"', "an object"]),
        ({"rope_scaling": {"type": "su"}}, ["rope_scaling.type", '"su"', "llama3", "yarn"]),
        ({"rope_scaling": {"type": ["yarn"]}}, ["rope_scaling.type", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling has no factor", '"linear"']),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["has no high_freq_factor"]),
        (scaled(factor="2"), ["rope_scaling.factor", '"2"', "numbers above 0"]),
        (scaled(factor=None), ["rope_scaling.factor", "null"]),
        (scaled(factor=True), ["rope_scaling.factor", "true"]),
        (scaled(factor=0), ["rope_scaling.factor is 0"]),
        (scaled(factor=float("nan")), ["rope_scaling.factor", "NaN"]),
        (scaled(rope_theta=-1.0), ["rope_scaling.rope_theta", "-1.0"]),
        ({"rope_theta": "10000"}, ["rope_theta", '"10000"']),
        ({"rope_parameters": {"rope_theta": None}}, ["rope_parameters.rope_theta", "null"]),
        ({"rope_parameters": {"full_attention": {}}}, ["rope_parameters.full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "whole heads"]),
        (scaled(mrope_section=[2, 2]), ["mrope_section", "null"]),
        ({"max_position_embeddings": "2048"}, ["max_position_embeddings", '"2048"']),
        (
            {"rope_scaling": {**TYPES["llama3"], "type": "llama3", "low_freq_factor": 4}},
            ["low_freq_factor is 4", "below high_freq_factor"],
        ),
        (
            {"rope_scaling": {**TYPES["yarn"], "type": "yarn", "truncate": 1}},
            ["rope_scaling.truncate", "true or false"],
        ),
        (
            {"rope_scaling": {**TYPES["longrope"], "type": "longrope", "long_factor": [1, "x"]}},
            ["rope_scaling.long_factor", "a list of numbers"],
        ),
    ],
)
def test_rope_bad_entry_is_an_error_of_one_line_naming_file_and_key(
    given: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(given, source="m/config.json")
    message = str(caught.value)
    assert message.startswith("m/config.json: ")
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_rope_entry_that_the_type_does_not_use_is_a_named_warning() -> None:
    parameters = read(scaled(beta_fast=32, finetuned=True))
    assert parameters.warnings == (
        'config.json: rope_scaling.beta_fast is not used by rope_type "linear".',
        'config.json: rope_scaling.finetuned is not used by rope_type "linear".',
    )


def test_rope_partial_rotation_is_read_where_the_model_honours_it() -> None:
    parameters = read({"partial_rotary_factor": 0.25}, partial=True)
    assert parameters.rotary_dim(64) == 16


@pytest.mark.parametrize(
    ("given", "head_dim"),
    [
        ({}, 1),
        ({}, 7),
        (scaled(type="dynamic"), 2),
        (old("longrope", "type"), 16),
    ],
)
def test_rope_head_that_cannot_be_rotated_is_an_error(given: dict[str, Any], head_dim: int) -> None:
    with pytest.raises(ConfigError, match=r"^config.json: "):
        read(given).check_head_dim(head_dim, "config.json")


def test_rope_scaling_comes_before_rope_parameters_as_in_transformers() -> None:
    given = {**new("default"), **old("linear", "type")}
    oracle = LlamaConfig(max_position_embeddings=2048, **copy.deepcopy(given))
    assert oracle.rope_parameters["rope_type"] == "linear"
    assert read(given).rope_type == "linear"
