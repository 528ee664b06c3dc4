"""Qwen3 with experts. Source: Yang et al., "Qwen3 technical report", 2025."""

from __future__ import annotations

from typing import ClassVar

from quire_models.decoder import DecoderForCausalLM, LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.mixture import MixtureOptions
from quire_models.qwen3_moe import Qwen3MoeConfig


class Qwen3Moe(DecoderForCausalLM):
    """Qwen3 with experts in some layers."""

    # An expert's product has as many rows as tokens chose it.
    batch_invariant: ClassVar[bool] = False

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the norm, the biases, the window and the layer's experts."""
        assert isinstance(config, Qwen3MoeConfig), type(config)
        mixture = MixtureOptions(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            size=config.moe_intermediate_size,
            normalised=config.norm_topk_prob,
        )
        return LayerOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm=config.rms_norm_eps,
            sliding_window=config.window(index),
            mixture=mixture if config.has_experts(index) else None,
        )
