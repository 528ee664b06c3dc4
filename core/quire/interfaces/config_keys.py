"""Keys of config.json that belong to no model in particular: harmless ones, and maths.

`ModelConfig.from_json` asks here about a key that the model's class does not declare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BOOKKEEPING = """
    _attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path
    _rope_scaling_validation _sliding_window_pattern _experts_implementation architectures
    attn_implementation auto_map chunk_size_feed_forward custom_pipelines experts_implementation
    finetuning_task fused_ops gradient_checkpointing id2label is_decoder is_llama_config
    keys_to_ignore_at_inference label2id license model_name model_type name_or_path num_labels
    output_attentions output_hidden_states output_past output_router_logits prefix problem_type
    return_dict sep_token_id task_specific_params tf_legacy_loss tie_last_hidden_states
    tokenizer_class torchscript transformers_version transformers.js_config unsloth_fixed
    unsloth_version use_bfloat16 use_cache use_flash_attention use_flash_attn use_return_dict
"""

# The tokenizer and generation_config.json decide about these; quantization plugins read the last.
_READ_ELSEWHERE = """
    begin_suppress_tokens bos_token_id decoder_start_token_id mask_token_id pad_token_id
    sep_token unk_token_id quantization_config
"""

_TRAINING = """
    attention_dropout attention_probs_dropout_prob attention_softmax_in_fp32 attn_pdrop
    aux_loss_alpha bias_dropout_fusion classifier_dropout dropout embd_pdrop embedding_dropout
    ep_size ff_factor hidden_dropout hidden_dropout_prob init_std initializer_factor
    initializer_range layerdrop masked_softmax_fusion offset_alibi pretraining_tp
    reorder_and_upcast_attn rescale_every resid_dropout resid_pdrop router_aux_loss_coef
    router_jitter_noise seq_aux skip_bias_add skip_bias_add_qkv slow_but_exact summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj use_fused_loss
    vocab_pad_to_multiple_of z_loss_coefficient
"""

# Transformers, too, takes these from generation_config.json and drops them from config.json.
_GENERATION = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids cache_implementation
    diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
    eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_logits_to_keep
    num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p
"""

HARMLESS_KEYS: frozenset[str] = frozenset(
    (_BOOKKEEPING + _READ_ELSEWHERE + _TRAINING + _GENERATION).split()
)
"""Keys that change nothing in a forward pass, whatever their value."""

_ABSENT: tuple[Any, ...] = (0, False, [], {})

_ABSENT_UNLESS_DECLARED = """
    add_cross_attention alibi apply_residual_connection_post_layernorm attention_chunk_size
    attention_sink attention_sinks attn_config attn_layer_indices attn_layer_period
    attn_logit_softcapping attn_softcapping attn_temperature_tuning attn_use_sinks audio_config
    block_types clip_qkv compression_config conv_L_cache cross_attention_hidden_size
    cross_attention_layers
    dim_model_base embedding_fraction emb_scale ffn_config final_logit_softcapping
    first_k_dense_replace full_attn_idxs head_layer_norm hybrid_override_pattern
    is_encoder_decoder is_moe kv_lora_rank layers_block_type linear_attention_config lm_head_bias
    logit_soft_cap logit_softcapping mamba_d_state mamba_n_heads mlp_only_layers
    moe_intermediate_size moe_layers moe_num_experts moe_top_k mrope_section multi_query
    mup_base_width mup_embeddings_multiplier n_routed_experts n_shared_experts
    new_decoder_architecture no_rope_layer_interval num_experts num_experts_per_tok
    num_local_experts parallel_attn per_layer_config prefix_lm pruned_heads q_lora_rank
    qk_layernorm qk_ln
    qk_norm qk_nope_head_dim qk_rope_head_dim query_pre_attn_scalar rope_interleave
    rope_interleaved rope_local_base_freq scale_attn_by_inverse_layer_idx scale_depth
    shared_expert_intermediate_size sliding_window sliding_window_pattern ssm_cfg swiglu_limit
    text_config tie_encoder_decoder
    use_alibi use_bidirectional_attention use_differential_attention use_l2_norm use_mamba
    use_mrope use_parallel_residual use_post_norm use_qk_layernorm use_qk_norm use_sliding_window
    v_head_dim vision_config zero_centered_rmsnorm
"""

_ONE_UNLESS_DECLARED = """
    attention_in_multiplier attention_out_multiplier attn_output_multiplier embedding_multiplier
    embedding_scale full_attn_mod interpolate_factor key_multiplier lm_head_multiplier logit_scale
    logits_scaling mup_multiplier mup_width_multiplier mup_width_scale partial_rotary_factor
    residual_multiplier rotary_pct routed_scaling_factor rope_pct rope_percent scale_emb width_scale
"""

MATHS_KEYS: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(_ABSENT_UNLESS_DECLARED.split(), _ABSENT),
    **dict.fromkeys(_ONE_UNLESS_DECLARED.split(), (1,)),
    # Without a value of its own the scale is head_dim**-0.5; no number stands for that.
    "attention_multiplier": (),
    "attn_scale": (),
    "hidden_activation": ("silu", "swish"),
    "is_causal": (True,),
    "layer_types": ("full_attention",),
    "mlp_multipliers": (1,),
    "no_rope_layers": (1,),
    "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    "position_embedding_type": ("rope", "rotary"),
    "use_rope": (True,),
}
"""Keys that change the maths in some family, with their neutral values.

Null is always neutral, and so is a list of nothing but neutral values. A model that does not
declare such a key refuses any other value.
"""
