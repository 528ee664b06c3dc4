"""Declarations of config.json: honoured, harmless, refused or warned about, never silent."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from attrs import frozen

from quire.errors import ConfigError
from quire.interfaces.config_keys import HARMLESS_KEYS, MATHS_KEYS
from quire.interfaces.model_config import ModelConfig, end_tokens, flag, one_of, real, refuse, whole


@frozen(kw_only=True)
class ToyConfig(ModelConfig):
    """A model with one key of each kind."""

    hidden_size: int = whole(64, 1, 1024, names=("n_embd", "hidden_size"))
    eos_token_ids: tuple[int, ...] = end_tokens(2)
    epsilon: float = real(1e-5, 0.0, 1.0)
    given_heads: int | None = whole(None, 1, 64, optional=True, names=("num_heads",))
    hidden_act: str = one_of("silu", ("silu",))
    alibi: bool = flag(False)

    def check(self) -> None:
        """Check that heads divide the hidden size."""
        if self.hidden_size % self.heads:
            raise refuse(self.source, "num_heads", self.heads, "divisors of n_embd")

    @property
    def heads(self) -> int:
        """Heads, four where the file does not say."""
        return self.given_heads or 4


def test_config_declared_keys_are_honoured() -> None:
    config = ToyConfig.from_json({"vocab_size": 9, "n_embd": 32, "epsilon": 0, "num_heads": 2})
    assert (config.vocab_size, config.hidden_size, config.epsilon, config.heads) == (9, 32, 0, 2)


def test_config_missing_keys_take_the_declared_defaults() -> None:
    config = ToyConfig.from_json({})
    assert (config.hidden_size, config.heads, config.eos_token_ids) == (64, 4, (2,))
    assert config == ToyConfig()


def test_config_key_may_have_several_names() -> None:
    assert ToyConfig.from_json({"hidden_size": 128}) == ToyConfig.from_json({"n_embd": 128})


@pytest.mark.parametrize(
    ("given", "expected"), [({}, (2,)), ({"eos_token_id": None}, ()), ({"eos_token_id": 7}, (7,))]
)
def test_config_end_tokens_are_one_or_none(given: dict[str, Any], expected: tuple[int]) -> None:
    assert ToyConfig.from_json(given).eos_token_ids == expected


def test_config_end_tokens_may_be_several() -> None:
    assert ToyConfig.from_json({"eos_token_id": [5, 3]}).eos_token_ids == (5, 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_config_dtype_has_two_spellings(given: dict[str, Any], expected: str | None) -> None:
    assert ModelConfig.from_json(given).dtype == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n_embd": "256"}, ["n_embd", '"256"', "whole numbers from 1 to 1024"]),
        ({"n_embd": 64.0}, ["n_embd", "64.0"]),
        ({"n_embd": None}, ["n_embd", "null"]),
        ({"n_embd": [64]}, ["n_embd", "[64]"]),
        ({"vocab_size": True}, ["vocab_size", "true", "whole numbers"]),
        ({"vocab_size": 10**12}, ["vocab_size", "1000000000000", "16777216"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "from 1 to 1024"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers is -1"]),
        ({"max_position_embeddings": 2**31}, ["max_position_embeddings"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings is 1", "true or false"]),
        ({"tie_word_embeddings": None}, ["tie_word_embeddings is null"]),
        ({"epsilon": "1e-5"}, ["epsilon", '"1e-5"', "numbers from 0.0 to 1.0"]),
        ({"epsilon": float("nan")}, ["epsilon", "NaN"]),
        ({"epsilon": float("inf")}, ["epsilon", "Infinity"]),
        ({"hidden_act": "gelu"}, ["hidden_act", '"gelu"', 'allowed: "silu"']),
        ({"hidden_act": ["silu"]}, ["hidden_act", '["silu"]']),
        ({"eos_token_id": "2"}, ["eos_token_id", '"2"', "a token id"]),
        ({"eos_token_id": [2, -1]}, ["eos_token_id", "[2, -1]"]),
        ({"eos_token_id": True}, ["eos_token_id", "true"]),
        ({"dtype": "float7"}, ["dtype", '"float7"', '"bfloat16"']),
        ({"torch_dtype": 16}, ["dtype", "16"]),
        ({"num_heads": 7}, ["num_heads is 7", "divisors of n_embd"]),
        ({"sliding_window": 4096}, ["sliding_window is 4096", "not honoured by ToyConfig"]),
        ({"residual_multiplier": 0.22}, ["residual_multiplier is 0.22", "allowed: null, 1"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping"]),
        ({"num_local_experts": 8}, ["num_local_experts"]),
        ({"clip_qkv": 8.0}, ["clip_qkv"]),
        ({"is_causal": False}, ["is_causal", "allowed: null, true"]),
    ],
)
def test_config_bad_value_is_an_error_of_one_line_naming_file_and_key(
    given: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ToyConfig.from_json(given, source="folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: ")
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("given", [[], "text", None, 3])
def test_config_that_is_no_object_is_an_error(given: Any) -> None:
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        ToyConfig.from_json(given)


def test_config_error_cuts_a_long_value() -> None:
    with pytest.raises(ConfigError) as caught:
        ToyConfig.from_json({"n_embd": list(range(100_000))})
    assert len(str(caught.value)) < 200


UNDECLARED = sorted(set(MATHS_KEYS) - ToyConfig.keys())
NEUTRAL = [(name, value) for name in UNDECLARED for value in (None, *MATHS_KEYS[name])]


@pytest.mark.parametrize(("name", "value"), NEUTRAL)
def test_config_key_of_another_familys_maths_is_allowed_when_neutral(name: str, value: Any) -> None:
    assert ToyConfig.from_json({name: value}).warnings == ()


@pytest.mark.parametrize("name", UNDECLARED)
def test_config_key_of_another_familys_maths_is_refused_at_any_other_value(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: {name} is 0.123"):
        ToyConfig.from_json({name: 0.123})


@pytest.mark.parametrize("name", sorted(HARMLESS_KEYS))
def test_config_harmless_key_is_accepted_in_silence(name: str) -> None:
    assert ToyConfig.from_json({name: "anything"}).warnings == ()


def test_config_harmless_keys_do_not_change_the_maths() -> None:
    assert HARMLESS_KEYS.isdisjoint(MATHS_KEYS)


def test_config_unknown_key_is_a_named_warning() -> None:
    config = ToyConfig.from_json({"flux_capacitor": 1.21}, source="f/config.json")
    assert config.warnings == (
        'f/config.json: key "flux_capacitor" (1.21) is unknown to ToyConfig and ignored.',
    )


def test_config_built_in_python_is_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match="config.json: vocab_size is 0"):
        ToyConfig(vocab_size=0)


def test_config_without_a_cache_size_says_so() -> None:
    with pytest.raises(NotImplementedError, match="ModelConfig"):
        _ = ModelConfig().kv_elements_per_token


def test_config_is_read_without_torch() -> None:
    code = "import sys, quire.interfaces.rope; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
