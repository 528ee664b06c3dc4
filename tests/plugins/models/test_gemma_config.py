"""Keys of Gemma 2 and 3 against the real config classes of Transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from config_oracle import default_differences, saved, undeclared_keys
from transformers import Gemma2Config, Gemma3TextConfig

from quire.errors import ConfigError
from quire_models import gemma

FULL, SLIDING = "full_attention", "sliding_attention"
SMALL = {"num_hidden_layers": 7, "vocab_size": 97, "hidden_size": 64, "head_dim": 16}
PAIRS: dict[str, tuple[Any, Any]] = {
    "gemma2": (Gemma2Config, gemma.Gemma2Config),
    "gemma3": (Gemma3TextConfig, gemma.Gemma3Config),
}


@pytest.mark.parametrize("name", PAIRS)
def test_declared_defaults_equal_the_real_class(name: str) -> None:
    real, own = PAIRS[name]
    config = own.from_json({})
    differences = default_differences(real(), config)
    # Told by the tests below.
    assert set(differences) <= {"layer_types", "rope_parameters"}
    assert (
        undeclared_keys(real, own) - {"attn_logit_softcapping", "use_bidirectional_attention"}
        == set()
    )


@pytest.mark.parametrize("name", PAIRS)
def test_a_saved_config_is_read_without_warning(name: str) -> None:
    real, own = PAIRS[name]
    config = own.from_json(saved(real(**SMALL)))
    assert config.warnings == ()
    assert config.kv_elements_per_token == 2 * 7 * 4 * 16


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {}),
        ("gemma2", {"layer_types": [FULL, SLIDING, SLIDING, SLIDING, SLIDING, FULL, FULL]}),
        ("gemma3", {}),
        ("gemma3", {"sliding_window_pattern": 3}),
        ("gemma3", {"layer_types": [SLIDING, FULL] * 3 + [SLIDING]}),
    ],
)
def test_windows_are_those_of_the_real_class(name: str, changes: dict[str, Any]) -> None:
    real, own = PAIRS[name]
    config = own.from_json({**SMALL, **changes})
    kinds = [SLIDING if config.is_sliding(i) else FULL for i in range(7)]
    assert kinds == real(**SMALL, **changes).layer_types


ROTATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "of 2025": {
        "rope_theta": 2e6,
        "rope_local_base_freq": 5e3,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "by kind": {
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e5},
            SLIDING: {"rope_type": "default", "rope_theta": 7e3},
        }
    },
    "one kind": {"rope_parameters": {SLIDING: {"rope_type": "default"}}, "rope_theta": 2e6},
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_of_gemma3_are_those_of_the_real_class(name: str) -> None:
    given = ROTATIONS[name]
    theirs = Gemma3TextConfig(**copy.deepcopy(given)).rope_parameters
    config = gemma.Gemma3Config.from_json(given)
    for kind, rope in ((FULL, config.rope), (SLIDING, config.local_rope)):
        assert {key: getattr(rope, key) for key in theirs[kind]} == theirs[kind]


# What files of the hub say, but for sizes.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-2-9b-it": (
        "gemma2",
        {
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 107],
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
    ),
    "gemma-3-1b-it": (
        "gemma3",
        {
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_without_warning(name: str) -> None:
    family, given = PUBLISHED[name]
    assert PAIRS[family][1].from_json(given).warnings == ()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma2", {"sliding_window": None}, "sliding_window is null; allowed: a number"),
        ("gemma2", {"layer_types": [SLIDING]}, "layer_types is .*allowed: 26 entries"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("gemma2", {"hidden_activation": "gelu"}, 'hidden_activation is "gelu"'),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("gemma2", {"rope_parameters": {FULL: {}}}, "rope_parameters.full_attention is an object"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, which"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is .*allowed: an ob"),
        ("gemma3", {"rope_parameters": 3}, "rope_parameters is 3; allowed: an object"),
        ("gemma3", {"rope_parameters": {FULL: 3}}, "rope_parameters is 3; allowed"),
        ("gemma3", {"rope_scaling": [1]}, "rope_scaling is .*allowed: an object"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3", {"rope_local_base_freq": -1.0}, "rope_theta is -1.0"),
    ],
)
def test_bad_value_is_an_error_naming_the_key(
    name: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        PAIRS[name][1].from_json(changes)
