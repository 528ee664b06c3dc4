"""Each family's declared keys against the real config class of Transformers."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import transformers
from config_oracle import (
    ROPE_SCALINGS,
    default_differences,
    rope_differences,
    saved,
    undeclared_keys,
)
from dense_model import PLUGINS

from quire.errors import ConfigError

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
SMALL = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def oracle_class(family: str) -> type[transformers.PreTrainedConfig]:
    found: type[transformers.PreTrainedConfig] = getattr(transformers, f"{family}Config")
    return found


def config_class(family: str) -> Any:
    return PLUGINS[f"{family}ForCausalLM"].config_class


def read(family: str, **changes: Any) -> Any:
    return config_class(family).from_json({**SMALL, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_declared_defaults_equal_the_real_class(family: str) -> None:
    ours = config_class(family).from_json({})
    assert default_differences(oracle_class(family)(), ours) == {}
    assert (ours.head_dim, ours.max_model_len) == (128, ours.max_position_embeddings)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_real_class_is_declared_or_harmless(family: str) -> None:
    assert undeclared_keys(oracle_class(family), config_class(family)) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_is_read_without_warning(family: str) -> None:
    config = config_class(family).from_json(saved(oracle_class(family)(**SMALL)))
    assert config.warnings == ()
    assert config.kv_elements_per_token == 2 * 4 * 2 * config.head_dim


@pytest.mark.parametrize("spelling", ["type", "rope_type", "rope_parameters"])
@pytest.mark.parametrize("rope_type", ROPE_SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rope_is_read_as_the_real_class_reads_it(
    family: str, rope_type: str, spelling: str
) -> None:
    scaling = ROPE_SCALINGS[rope_type]
    given: dict[str, Any] = {"rope_theta": 1e6, "rope_scaling": None}
    if spelling == "rope_parameters":
        entries = {"rope_theta": 1e6, "rope_type": rope_type, **(scaling or {})}
        given = {"rope_parameters": entries}
    elif scaling is not None:
        given["rope_scaling"] = {spelling: rope_type, **scaling}
    oracle = oracle_class(family)(**copy.deepcopy(given))
    assert rope_differences(oracle, config_class(family).from_json(given)) == {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_attention_heads": 7, "head_dim": None}, "num_attention_heads"),
        ({"num_attention_heads": 7, "head_dim": 64}, "num_key_value_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"hidden_size": "256"}, "hidden_size"),
        ({"head_dim": 65}, "head_dim"),
        ({"intermediate_size": True}, "intermediate_size"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"layer_types": ["full_attention", "mamba"] * 2}, "layer_types"),
    ],
)
def test_bad_value_is_an_error_naming_the_key(
    family: str, changes: dict[str, Any], key: str
) -> None:
    if family == "Qwen3" and changes.get("head_dim", 0) is None:
        key = "head_dim"
    with pytest.raises(ConfigError, match=rf"^config.json: {key} (is|has) "):
        read(family, **changes)


WINDOWS: list[dict[str, Any]] = [
    {},
    {"use_sliding_window": True, "sliding_window": 8},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
    {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
    {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
]


@pytest.mark.parametrize("given", WINDOWS)
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_windows_are_those_the_real_class_resolves(family: str, given: dict[str, Any]) -> None:
    oracle = oracle_class(family)(**SMALL, **copy.deepcopy(given))
    expected = [
        oracle.sliding_window if kind == "sliding_attention" else None
        for kind in oracle.layer_types
    ]
    config = read(family, **given)
    assert [config.window(layer) for layer in range(4)] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["sliding_attention"] * 4},
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": "full_attention"},
    ],
)
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_layer_types_that_contradict_are_an_error(family: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^config.json: layer_types is "):
        read(family, **changes)


def test_mistral_layers_of_two_kinds_are_an_error() -> None:
    with pytest.raises(ConfigError, match='only "sliding_attention"'):
        read("Mistral", layer_types=["full_attention", "sliding_attention"] * 2)


def test_llama_window_is_an_error() -> None:
    with pytest.raises(ConfigError, match="sliding_window is 4096, which changes"):
        read("Llama", sliding_window=4096)


def test_explicit_head_dim_needs_no_divisor_of_the_hidden_size() -> None:
    assert read("Mistral", hidden_size=250, head_dim=64).head_dim == 64


def test_longest_context_follows_the_scaling() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read("Qwen2", max_position_embeddings=32768, rope_scaling=scaling)
    assert (config.max_model_len, config.longest_model_len) == (32768, 131072)


def test_rope_entry_without_use_is_repeated_among_the_warnings() -> None:
    config = read("Qwen2", rope_scaling={"type": "linear", "factor": 2.0, "finetuned": True})
    assert [w for w in config.warnings if "rope_scaling.finetuned" in w] == list(config.warnings)
    assert len(config.warnings) == 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_entry_point_module_imports_no_torch(family: str) -> None:
    code = f"import sys, quire_models.{family}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("architecture", PLUGINS)
def test_architectures_are_claimed_by_the_plugin_whose_class_loads(architecture: str) -> None:
    from quire.interfaces.model import Model

    assert issubclass(PLUGINS[architecture].load_class(), Model)
