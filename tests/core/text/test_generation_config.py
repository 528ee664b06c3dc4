"""generation_config.json is read as vLLM takes it, and each mistake names file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.errors import ConfigError
from quire.request import SamplingParams
from quire.text.generation_config import GenerationDefaults


def read(folder: Path, content: Any) -> GenerationDefaults:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    return GenerationDefaults.from_folder(folder)


def test_a_folder_without_the_file_has_no_defaults(tmp_path: Path) -> None:
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()


def test_end_tokens_of_all_sources_are_united(tmp_path: Path) -> None:
    defaults = read(tmp_path, {"eos_token_id": [5, 7], "bos_token_id": 1, "pad_token_id": 0})

    ids = defaults.all_eos_token_ids(config_eos=[7, 9], tokenizer_eos=11)

    assert ids == {5, 7, 9, 11}
    assert (defaults.bos_token_id, defaults.pad_token_id) == (1, 0)


@pytest.mark.parametrize(("value", "ids"), [(3, (3,)), ([3, 4], (3, 4)), (None, ()), ([], ())])
def test_the_end_token_may_be_one_or_a_list(
    tmp_path: Path, value: Any, ids: tuple[int, ...]
) -> None:
    assert read(tmp_path, {"eos_token_id": value}).eos_token_ids == ids


def test_sampling_defaults_have_the_names_of_sampling_params(tmp_path: Path) -> None:
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "max_new_tokens": 64}
    defaults = read(tmp_path, {**config, "do_sample": True, "_from_model_config": True})

    params = SamplingParams(**defaults.sampling_defaults())

    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 20)
    assert (params.min_p, params.max_tokens) == (0.1, 64)
    assert defaults.warnings == ()


def test_a_repetition_penalty_is_ignored_with_a_warning_that_names_it(tmp_path: Path) -> None:
    defaults = read(tmp_path, {"repetition_penalty": 1.05})

    assert defaults.sampling_defaults() == {}
    assert len(defaults.warnings) == 1
    assert "repetition_penalty is 1.05" in defaults.warnings[0]


def test_a_neutral_repetition_penalty_gives_no_warning(tmp_path: Path) -> None:
    assert read(tmp_path, {"repetition_penalty": 1.0}).warnings == ()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": list(range(5000))}, "eos_token_id"),
        ({"pad_token_id": 1.5}, "pad_token_id"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"repetition_penalty": "high"}, "repetition_penalty"),
        ("{not json", "not JSON"),
        ("[1]", "list"),
        ("[" * 100_000, "not usable JSON"),
    ],
)
def test_a_bad_value_is_an_error_that_names_file_and_key(
    tmp_path: Path, content: Any, named: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, content)

    message = str(error.value)
    assert "generation_config.json" in message
    assert named in message
    assert "\n" not in message
    assert len(message) < 500
