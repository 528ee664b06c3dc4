"""Logits of each family against the real class, tiny and random, in float32 and float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from config_oracle import saved
from dense_model import batch_of, build, copy_weights, logits_of, read_config
from transformers import PreTrainedModel

from quire.layers.places import places

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
SEQUENCES = [list(range(1, 25)), [5], [40, 3, 40, 3, 7, 9, 80, 1, 2, 2, 6]]
# More to judge by: errors are the largest of some thousand numbers, of both in the same places.
OTHERS = [[(7 * i + 5 * n) % 83 for i in range(n)] for n in (30, 24, 17, 11)]


def rope(rope_type: str, **entries: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1000.0, **entries}}


FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
LONGROPE = rope("longrope", attention_factor=1.25, **FACTORS)
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama with one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama with all kv heads": ("Llama", {"num_key_value_heads": None}),
    "llama with larger heads": ("Llama", {"head_dim": 24}),
    "llama with another eps": ("Llama", {"rms_norm_eps": 0.1}),
    "llama linear": ("Llama", rope("linear", factor=4.0)),
    "llama dynamic": ("Llama", rope("dynamic", factor=4.0)),
    "llama llama3": (
        "Llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama yarn": ("Llama", rope("yarn", factor=2.0, original_max_position_embeddings=16)),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral without window": ("Mistral", {"sliding_window": None}),
    "mistral with a window of one": ("Mistral", {"sliding_window": 1}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2 with layer types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2 tied yarn": (
        "Qwen2",
        {
            "tie_word_embeddings": True,
            **rope("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=4),
        },
    ),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "phi3 tied, with a window, three quarters of a head rotated": (
        "Phi3",
        {
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            **rope("default", partial_rotary_factor=0.75),
        },
    ),
    "phi3 longrope beyond its original length": (
        "Phi3",
        {"pad_token_id": 0, "original_max_position_embeddings": 8, **LONGROPE},
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2 with biases and another eps": ("Olmo2", {"attention_bias": True, "rms_norm_eps": 0.1}),
    "deepseek v2": ("DeepseekV2", {**LATENT, "routed_scaling_factor": 2.0}),
    "deepseek v2 lite with biases": (
        "DeepseekV2",
        {**LATENT, "q_lora_rank": None, "attention_bias": True, "mlp_bias": True},
    ),
    "deepseek v2 in the best groups": (
        "DeepseekV2",
        {**LATENT, "topk_method": "group_limited_greedy", "first_k_dense_replace": 0},
    ),
    "deepseek v3 yarn": (
        "DeepseekV3",
        {
            **LATENT,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=8,
                mscale=1.0,
                mscale_all_dim=0.7,
            ),
        },
    ),
    "deepseek v3 not interleaved, not normalised": (
        "DeepseekV3",
        {**LATENT, "rope_interleave": False, "norm_topk_prob": False, "attention_bias": True},
    ),
    "deepseek v3 without experts": ("DeepseekV3", {**LATENT, "first_k_dense_replace": 3}),
    "gpt oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "gpt oss with full attention and a low limit": (
        "GptOss",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "swiglu_limit": 0.5,
            "attention_bias": False,
            **rope("default"),
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "mixtral with a window": ("Mixtral", {"num_local_experts": 3, "sliding_window": 4}),
    "mixtral with one expert a token": (
        "Mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 1},
    ),
    "qwen2 moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen2 moe normalised, in every second layer": (
        "Qwen2Moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
        },
    ),
    "qwen2 moe with windows": (
        "Qwen2Moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
    "qwen3 moe normalised, tied": (
        "Qwen3Moe",
        {**EXPERTS, "head_dim": 8, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen3 moe with all experts, a window and biases": (
        "Qwen3Moe",
        {
            **EXPERTS,
            "num_experts_per_tok": 6,
            "mlp_only_layers": [0, 2],
            "use_sliding_window": True,
            "sliding_window": 3,
            "attention_bias": True,
        },
    ),
    "qwen3 tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3 with windows": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    ),
}


def make_oracle(family: str, changes: dict[str, Any]) -> PreTrainedModel:
    """Make the real class with random weights, norms and biases included."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy({**SIZES, **changes}))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0.0, 0.3).add_(1.0 if "norm" in name else 0.0)
    for name, buffer in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.3)
    return model


@torch.inference_mode()
def oracle_logits(model: PreTrainedModel, sequence: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([sequence])).logits[0]
    return logits


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_real_class_whatever_else_is_in_the_batch(name: str) -> None:
    family, changes = CASES[name]
    oracle = make_oracle(family, changes)
    model = build(f"{family}ForCausalLM", read_config(f"{family}ForCausalLM", saved(oracle.config)))
    assert copy_weights(model, oracle) == (set(), set())
    judged = SEQUENCES + OTHERS
    ours = logits_of(model, judged)
    theirs = [oracle_logits(oracle, sequence) for sequence in judged]
    exact_model = oracle.double()
    exact = [oracle_logits(exact_model, sequence) for sequence in judged]
    found = max(float((a - b).abs().max()) for a, b in zip(ours, exact, strict=True))
    plain = max(float((a - b).abs().max()) for a, b in zip(theirs, exact, strict=True))
    largest = max(float(e.abs().max()) for e in exact)
    assert found <= 2 * plain + torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize("name", ["llama with biases", "qwen3 tied"])
def test_half_precision_errs_at_most_twice_as_much_as_the_real_class(name: str) -> None:
    family, changes = CASES[name]
    oracle = make_oracle(family, changes)
    config = read_config(f"{family}ForCausalLM", saved(oracle.config))
    # Weights that bfloat16 holds exactly, so that only the computation differs.
    oracle.bfloat16()
    model = build(f"{family}ForCausalLM", config, dtype=torch.bfloat16)
    copy_weights(model, oracle)
    ours = torch.cat(logits_of(model, SEQUENCES)).double()
    theirs = torch.cat([oracle_logits(oracle, s) for s in SEQUENCES]).double()
    oracle.double()
    exact = torch.cat([oracle_logits(oracle, s) for s in SEQUENCES])
    bound = 2 * (theirs - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= bound


def test_names_of_checkpoint_tensors_are_those_of_the_real_class() -> None:
    oracle = make_oracle("Qwen3", {"num_hidden_layers": 1, "num_attention_heads": 4})
    config = read_config("Qwen3ForCausalLM", saved(oracle.config))
    model = build("Qwen3ForCausalLM", config)
    assert copy_weights(model, oracle) == (set(), set())


@pytest.mark.parametrize(
    "name", ["model.rotary_emb.inv_freq", "model.layers.3.self_attn.rotary_emb.inv_freq"]
)
def test_old_checkpoints_rotary_frequencies_are_ignored(name: str) -> None:
    import re

    from quire_models.decoder import DecoderForCausalLM

    patterns = DecoderForCausalLM.weight_names.ignored
    assert any(re.fullmatch(pattern, name) for pattern in patterns)


@pytest.mark.parametrize(("num_modules", "is_left"), [(1, True), (0, False), (None, False)])
def test_modules_of_deepseek_that_predict_further_tokens_are_left_in_the_file(
    num_modules: int | None, is_left: bool
) -> None:
    import re

    config = {**SIZES, **LATENT, "num_hidden_layers": 2, "num_nextn_predict_layers": num_modules}
    model = build("DeepseekV3ForCausalLM", read_config("DeepseekV3ForCausalLM", config))
    further = {f"model.layers.2.{n}" for n in ("eh_proj.weight", "mlp.gate.weight")}
    one_more_layer = {"model.layers.2.mlp.gate.weight"}

    def ignored_of(names: set[str]) -> set[str]:
        patterns = model.weight_names.ignored_among(names)
        return {n for n in names if any(re.fullmatch(pattern, n) for pattern in patterns)}

    assert ignored_of(further | set(places(model))) == (further if is_left else set())
    assert ignored_of(one_more_layer | set(places(model))) == set()


@torch.inference_mode()
def test_wanted_rows_alone_equal_the_rows_of_all() -> None:
    oracle = make_oracle("Qwen3", {"head_dim": 16}).double()
    config = read_config("Qwen3ForCausalLM", saved(oracle.config))
    model = build("Qwen3ForCausalLM", config, dtype=torch.float64)
    copy_weights(model, oracle)
    wanted = torch.tensor([23, 24, 35], dtype=torch.int32)
    batch = batch_of(SEQUENCES)
    hidden = model.embed(batch.token_ids)
    everything = model(hidden.clone(), batch)

    batch.logit_rows = wanted
    found = model(hidden.clone(), batch)

    assert everything.shape[0] == 36
    assert torch.allclose(found, everything[wanted.long()], rtol=0, atol=1e-12)
