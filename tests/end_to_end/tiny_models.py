"""A tiny random model of any causal class that Transformers has."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = tuple(dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
VOCAB = 97
# By what the keys of configurations are called; of a part of a configuration as of the whole.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "dim_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("n_inner", "dff", "d_inner", "ffn_hidden_size", "feed_forward_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "v_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("eos_token_id",), 2),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "chunk_size"), 6),
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# What a class needs besides.
DECODER = {"is_decoder": True}
LATENT = {"num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 16}
HEAD = {"head_dim": 8}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
ABSENT: Any = object()  # a key that is left to the class
GEMMA4 = {**PER_LAYER, "head_dim": ABSENT, "num_key_value_heads": ABSENT}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
SPECIAL: dict[str, dict[str, Any]] = {
    "AXK1ForCausalLM": LATENT,
    "AXK2ForCausalLM": LATENT,
    "BailingHybridForCausalLM": {"layer_group_size": 2, "num_experts_per_tok": 2, "n_group": 2},
    "BambaForCausalLM": MAMBA,
    "BertGenerationDecoder": DECODER,
    "BertLMHeadModel": DECODER,
    "BigBirdForCausalLM": {**DECODER, "attention_type": "original_full"},
    "CamembertForCausalLM": DECODER,
    "CodeGenForCausalLM": {"rotary_dim": 8},
    "CohereCompassForCausalLM": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "Data2VecTextForCausalLM": DECODER,
    "DeepseekV2ForCausalLM": {**LATENT, "num_experts_per_tok": 2},
    "DeepseekV32ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "ElectraForCausalLM": DECODER,
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "Dots3NoteForCausalLM": {"num_key_value_heads": 4},
    "DoryForCausalLM": {"sliding_window": 128},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "ErnieForCausalLM": DECODER,
    "GPTJForCausalLM": {"rotary_dim": 8},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "Glm4MoeLiteForCausalLM": LATENT,
    "GlmMoeDsaForCausalLM": LATENT,
    "GraniteMoeHybridForCausalLM": MAMBA,
    "HunYuanDenseV1ForCausalLM": HEAD,
    "HunYuanMoEV1ForCausalLM": HEAD,
    "Inkling2ForCausalLM": {"unpadded_vocab_size": VOCAB},
    "Inkling2LoopForCausalLM": {"unpadded_vocab_size": VOCAB},
    "Gemma4AssistantForCausalLM": {"hidden_size_per_layer_input": 0},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0, **PER_LAYER},
    "Gemma4ForCausalLM": GEMMA4,
    "Gemma4UnifiedForCausalLM": GEMMA4,
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "KimiLinearForCausalLM": {"num_experts_per_token": 2},
    "LongcatFlashForCausalLM": LATENT,
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MegatronBertForCausalLM": DECODER,
    "MiniCPM3ForCausalLM": LATENT,
    "MinistralForCausalLM": HEAD,
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "ReformerModelWithLMHead": {
        **DECODER,
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 16),
        "num_buckets": 2,
    },
    "RemBertForCausalLM": DECODER,
    "RoCBertForCausalLM": DECODER,
    "RoFormerForCausalLM": DECODER,
    "RobertaForCausalLM": DECODER,
    "RobertaPreLayerNormForCausalLM": DECODER,
    "XLMRobertaForCausalLM": DECODER,
    "XLMRobertaXLForCausalLM": DECODER,
    "XmodForCausalLM": {**DECODER, "default_language": "en_XX"},
    "YoutuForCausalLM": LATENT,
    "Zamba2ForCausalLM": {**MAMBA, "layers_block_type": ["hybrid", "mamba"]},
    "ZambaForCausalLM": {"layers_block_type": ["hybrid", "mamba"]},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}


def shrunk(given: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration whose values make it tiny."""
    made: dict[str, Any] = {}
    for name, value in given.items():
        if name in SIZES and value is not None:
            made[name] = SIZES[name]
        elif name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            made[name] = [kinds[0], kinds[-1]]
        elif isinstance(value, dict) and name.endswith("_config") and name != "per_layer_config":
            made[name] = {**shrunk(value), "model_type": value.get("model_type", "")}
    return made


def make_config(architecture: str) -> Any:
    """Return a tiny configuration of the class."""
    config_class = getattr(transformers, architecture).config_class
    keys = {**shrunk(config_class().to_dict()), **SPECIAL.get(architecture, {})}
    return config_class(**{name: value for name, value in keys.items() if value is not ABSENT})


def make_model(architecture: str) -> PreTrainedModel:
    """Return the class with random weights, norms and biases included."""
    torch.manual_seed(3)
    config = make_config(architecture)
    model: PreTrainedModel = getattr(transformers, architecture)(config).eval()
    for name, parameter in model.named_parameters():
        base = parameter.data.mean() if "norm" in name or "ln" in name else 0.0
        parameter.data.normal_(0.0, 0.25).add_(base)
    return model
