"""config.json of DeepSeek and gpt-oss: the real classes' defaults, real files, and bad input."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import transformers
from config_oracle import default_differences, rope_differences, saved, undeclared_keys
from dense_model import PLUGINS, read_config

from quire.errors import ConfigError
from quire.interfaces.model_config import ModelConfig

FAMILIES = ("DeepseekV2", "DeepseekV3", "GptOss")
# Without it the first class has no number of experts a token at all.
GIVEN = {"num_experts_per_tok": 4}
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSeek-V2-Lite": (
        "DeepseekV2",
        {
            **{"aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "hidden_size": 2048},
            **{"intermediate_size": 10944, "kv_lora_rank": 512, "moe_layer_freq": 1},
            **{"max_position_embeddings": 163840, "moe_intermediate_size": 1408, "n_group": 1},
            **{"n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False},
            **{"num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27},
            **{"num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128},
            **{"qk_rope_head_dim": 64, "rope_theta": 10000, "routed_scaling_factor": 1.0},
            **{"scoring_func": "softmax", "seq_aux": True, "topk_group": 1, "v_head_dim": 128},
            **{"topk_method": "greedy", "torch_dtype": "bfloat16", "vocab_size": 102400},
            "rope_scaling": {
                **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
                **{"beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
            },
        },
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {
            **{"ep_size": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
            **{"moe_layer_freq": 1, "num_nextn_predict_layers": 1, "scoring_func": "sigmoid"},
            **{"topk_method": "noaux_tc", "routed_scaling_factor": 2.5, "rope_theta": 10000},
            "rope_scaling": {
                **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
                **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
            },
        },
    ),
    "Kimi-K2": (
        "DeepseekV3",
        {
            **{"first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1},
            **{"n_routed_experts": 384, "n_shared_experts": 1, "num_attention_heads": 64},
            **{"num_key_value_heads": 64, "num_nextn_predict_layers": 0, "ep_size": 1},
            **{"routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True},
            **{"topk_method": "noaux_tc", "vocab_size": 163840, "rope_theta": 50000.0},
            **{"max_position_embeddings": 131072, "aux_loss_alpha": 0.001, "pretraining_tp": 1},
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "rope_scaling": {
                **{"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
                **{"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            },
        },
    ),
    "gpt-oss-20b": (
        "GptOss",
        {
            **{"experts_per_token": 4, "num_experts_per_tok": 4, "num_hidden_layers": 2},
            **{"layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 7.0},
            **{"router_aux_loss_coef": 0.9, "initial_context_length": 4096},
            **{"num_local_experts": 32, "rope_theta": 150000, "sliding_window": 128},
            "quantization_config": {"quant_method": "mxfp4"},
        },
    ),
}


def oracle_class(family: str) -> Any:
    return getattr(transformers, f"{family}Config")


def read(family: str, **given: Any) -> Any:
    return read_config(f"{family}ForCausalLM", {**GIVEN, **given})


@pytest.mark.parametrize("family", FAMILIES)
def test_declared_defaults_equal_the_real_class(family: str) -> None:
    given = GIVEN if family == "DeepseekV2" else {}
    real, ours = oracle_class(family)(**given), read_config(f"{family}ForCausalLM", given)

    found = default_differences(real, ours)

    assert set(found) <= {"rope_parameters", *given}
    assert rope_differences(real, ours) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_real_class_is_declared_or_harmless(family: str) -> None:
    ours = PLUGINS[f"{family}ForCausalLM"].config_class
    assert undeclared_keys(oracle_class(family), ours) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_is_read_without_warning(family: str) -> None:
    config = read(family, **saved(oracle_class(family)(**GIVEN)))
    assert isinstance(config, ModelConfig)
    assert config.warnings == ()


@pytest.mark.parametrize("name", REAL)
def test_what_real_files_say_is_read_without_warning(name: str) -> None:
    family, given = REAL[name]
    assert read(family, **given).warnings == ()


def test_scale_and_cache_of_deepseek_v2_lite() -> None:
    config = read(*[REAL["DeepSeek-V2-Lite"][0]], **REAL["DeepSeek-V2-Lite"][1])

    assert config.kv_elements_per_token == 27 * 576
    assert config.longest_model_len == 163840
    mscale = 0.1 * 0.707 * math.log(40) + 1
    assert config.scale == pytest.approx(192**-0.5 * mscale**2)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("DeepseekV2", {"num_key_value_heads": 2}, "num_key_value_heads is 2; allowed: null, or num_"),
    ("DeepseekV2", {"num_experts_per_tok": None}, "num_experts_per_tok is null"),
    ("DeepseekV2", {"num_experts_per_tok": 65}, "num_experts_per_tok is 65"),
    ("DeepseekV2", {"qk_rope_head_dim": 5}, "qk_rope_head_dim is 5; allowed: even"),
    ("DeepseekV2", {"head_dim": 128}, "head_dim is 128; allowed: null, or qk_rope_head_dim, 64"),
    ("DeepseekV2", {"qk_head_dim": 128}, "qk_head_dim is 128; allowed: qk_nope.* together, 192"),
    ("DeepseekV2", {"topk_method": "noaux_tc"}, 'topk_method is "noaux_tc"; allowed: "greedy"'),
    ("DeepseekV2", {"norm_topk_prob": True}, "norm_topk_prob is true; allowed: false"),
    ("DeepseekV2", {"scoring_func": "sigmoid"}, 'scoring_func is "sigmoid"'),
    ("DeepseekV2", {"moe_layer_freq": 2}, "moe_layer_freq is 2; allowed: 1"),
    ("DeepseekV2", {"kv_lora_rank": 0}, "kv_lora_rank is 0"),
    ("DeepseekV2", {"q_lora_rank": "all"}, 'q_lora_rank is "all"'),
    (
        "DeepseekV2",
        {"topk_method": "group_limited_greedy"},
        "n_group is null; allowed: divisors of n_routed_experts, 64",
    ),
    ("DeepseekV3", {"n_group": 7}, "n_group is 7; allowed: divisors of n_routed_experts, 256"),
    ("DeepseekV3", {"n_group": 256, "topk_group": 9}, "n_group is 256; allowed: .*two experts"),
    ("DeepseekV3", {"topk_group": 9}, "topk_group is 9; allowed: whole numbers from 1, "),
    ("DeepseekV3", {"n_group": 128, "topk_group": 1}, "topk_group is 1; .* from 2, .* of 2 hold"),
    ("DeepseekV3", {"rope_interleave": 1}, "rope_interleave is 1"),
    ("GptOss", {"num_experts_per_tok": 129}, "num_experts_per_tok is 129"),
    ("GptOss", {"sliding_window": None}, "sliding_window is null; allowed: numbers from 1, where"),
    ("GptOss", {"layer_types": ["full_attention"]}, "layer_types is .*36 entries"),
    ("GptOss", {"swiglu_limit": -1}, "swiglu_limit is -1"),
]


@pytest.mark.parametrize(("family", "given", "says"), BAD, ids=[str(bad[1]) for bad in BAD])
def test_bad_values_are_errors_that_name_the_key(
    family: str, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        read(family, **given)


@pytest.mark.parametrize("family", ["deepseek", "gpt_oss"])
def test_entry_point_module_imports_no_torch(family: str) -> None:
    code = f"import sys, quire_models.{family}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
