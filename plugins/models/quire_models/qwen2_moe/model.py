"""Qwen2 with experts. Source: Yang et al., "Qwen2 technical report", 2024."""

from __future__ import annotations

from typing import ClassVar

from quire_models.decoder import DecoderForCausalLM, LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.mixture import MixtureOptions
from quire_models.qwen2_moe import Qwen2MoeConfig


class Qwen2Moe(DecoderForCausalLM):
    """Qwen2 with experts in some layers, and one there that serves every token."""

    # An expert's product has as many rows as tokens chose it.
    batch_invariant: ClassVar[bool] = False

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the biases, the layer's window and its experts."""
        assert isinstance(config, Qwen2MoeConfig), type(config)
        mixture = MixtureOptions(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            size=config.moe_intermediate_size,
            normalised=config.norm_topk_prob,
            shared_size=config.shared_expert_intermediate_size,
        )
        return LayerOptions(
            qkv_bias=config.qkv_bias,
            sliding_window=config.window(index),
            mixture=mixture if config.has_experts(index) else None,
        )
