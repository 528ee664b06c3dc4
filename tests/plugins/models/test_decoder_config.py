"""Each family's declared keys against the real config class of Transformers."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
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

WHOLE_HEADS = ("Llama", "Mistral", "Mixtral", "Olmo2", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe")
FAMILIES = (*WHOLE_HEADS, "Phi3")
HEAD_DIMS = {"Qwen3Moe": 64, "Phi3": 96}
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
    found = (ours.head_dim, ours.max_model_len)
    assert found == (HEAD_DIMS.get(family, 128), ours.max_position_embeddings)


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
@pytest.mark.parametrize("family", WHOLE_HEADS)
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
    if family == "Phi3" and key == "partial_rotary_factor":
        changes = {key: 1.5}
        key = r"rope_parameters.partial_rotary_factor"
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
@pytest.mark.parametrize("family", ["Qwen2", "Qwen2Moe", "Qwen3"])
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


@pytest.mark.parametrize("original", [{}, {"original_max_position_embeddings": 64}])
@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_long_rotation_of_phi3_is_read_as_the_real_class_reads_it(
    kind: str, original: dict[str, Any]
) -> None:
    factors = {"short_factor": [1.0] * 24, "long_factor": [2.0] * 24}
    given = {
        **original,
        "max_position_embeddings": 8192,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": kind, **factors},
    }
    oracle = oracle_class("Phi3")(**SMALL, **copy.deepcopy(given))
    config = read("Phi3", **given)
    real = dict(oracle.rope_parameters)
    assert [list(getattr(config.rope, name)) for name in factors] == [
        list(real.pop(name)) for name in factors
    ]
    assert {name: getattr(config.rope, name) for name in real if name != "type"} == {
        name: value for name, value in real.items() if name != "type"
    }


def test_first_name_of_the_long_rotation_is_read() -> None:
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    old, new = (read("Phi3", rope_scaling={"type": t, **factors}) for t in ("su", "longrope"))
    assert old.rope == new.rope
    assert (new.rope.rope_type, new.rope.original_max_position_embeddings) == ("longrope", 4096)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is"),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 32}},
            "short_factor has 1 numbers; allowed: 32",
        ),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0] * 32}}, "has no long_factor"),
        ({"attention_bias": True}, "attention_bias is true; allowed: false, null"),
        ({"full_attn_mod": 2}, "full_attn_mod is 2, which changes"),
    ],
)
def test_what_phi3_cannot_have_is_an_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read("Phi3", **changes)


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


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 1.5}, "num_experts_per_tok"),
        ({"num_local_experts": -1, "num_experts": -1}, "num_(local_)?experts"),
        ({"num_local_experts": 10**6, "num_experts": 10**6}, "num_(local_)?experts"),
    ],
)
def test_bad_experts_are_an_error_naming_the_key(
    family: str, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^config.json: {key} is .*; allowed: "):
        read(family, **{"num_local_experts": 4, "num_experts": 4, **changes})


@pytest.mark.parametrize("family", ["Qwen2Moe", "Qwen3Moe"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_intermediate_size", 0),
        ("decoder_sparse_step", 0),
        ("mlp_only_layers", [0.5]),
        ("mlp_only_layers", 1),
        ("norm_topk_prob", 1),
    ],
)
def test_bad_layers_of_experts_are_an_error_naming_the_key(
    family: str, key: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: {key} is .*; allowed: "):
        read(family, **{key: value})


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
@pytest.mark.parametrize("key", ["num_local_experts", "num_experts"])
def test_number_of_experts_has_two_names(family: str, key: str) -> None:
    config = read(family, **{key: 16, "num_experts_per_tok": 16})
    assert 16 in (getattr(config, "num_experts", 0), getattr(config, "num_local_experts", 0))
    assert config.warnings == ()


EXPERT_LAYERS: list[dict[str, Any]] = [
    {},
    {"decoder_sparse_step": 2},
    {"decoder_sparse_step": 3, "mlp_only_layers": [2]},
    {"mlp_only_layers": [0, 3, 9]},
    {"mlp_only_layers": None},
]


@pytest.mark.parametrize("given", EXPERT_LAYERS)
@pytest.mark.parametrize("family", ["Qwen2Moe", "Qwen3Moe"])
def test_layers_with_experts_are_those_of_the_real_class(
    family: str, given: dict[str, Any]
) -> None:
    sizes = {"moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
    real = oracle_class(family)(**{**SMALL, **sizes, **given})
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(real)
    theirs = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    ours = read(family, **{**sizes, **given})
    assert [ours.has_experts(i) for i in range(4)] == theirs


@pytest.mark.parametrize("given", [w for w in WINDOWS if "layer_types" not in w])
def test_windows_of_qwen3_moe_are_those_of_all_layers(given: dict[str, Any]) -> None:
    real = oracle_class("Qwen3Moe")(**{**SMALL, **given})
    config = read("Qwen3Moe", **given)
    assert [config.window(i) for i in range(4)] == [real.sliding_window] * 4


@pytest.mark.parametrize(
    "family",
    [
        "gemma",
        "gpt2",
        "llama",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
    ],
)
def test_entry_point_module_imports_no_torch(family: str) -> None:
    code = f"import sys, quire_models.{family}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("architecture", PLUGINS)
def test_architectures_are_claimed_by_the_plugin_whose_class_loads(architecture: str) -> None:
    from quire.interfaces.model import Model

    assert issubclass(PLUGINS[architecture].load_class(), Model)


# What files of the hub say, but for sizes.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral-8x7B": (
        "Mixtral",
        {
            "attention_dropout": 0.0,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        "Qwen2Moe",
        {
            "decoder_sparse_step": 1,
            "max_window_layers": 21,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
            "use_sliding_window": False,
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        {
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "output_router_logits": False,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    ),
    "Qwen3-Coder-30B-A3B": (
        "Qwen3Moe",
        {
            "norm_topk_prob": True,
            "qkv_bias": False,
            "shared_expert_intermediate_size": 0,
            "use_qk_norm": True,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_mixtures_are_read_without_warning(name: str) -> None:
    family, given = PUBLISHED[name]
    assert read(family, **given).warnings == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_qk_norm", False), ("qkv_bias", True), ("shared_expert_intermediate_size", 64)],
)
def test_what_qwen3_moe_never_has_is_an_error(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: {key} is .*; allowed: "):
        read("Qwen3Moe", **{key: value})
