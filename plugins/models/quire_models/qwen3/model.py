"""Qwen3. Source: Yang et al., "Qwen3 technical report", 2025."""

from __future__ import annotations

from quire_models.decoder import DecoderForCausalLM, LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.qwen3 import Qwen3Config
from quire_models.score_head import ScoreHead


class Qwen3(DecoderForCausalLM):
    """Llama with a norm on each head of q and k instead of biases."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the norm, the biases and the layer's window."""
        assert isinstance(config, Qwen3Config), type(config)
        return LayerOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm=config.rms_norm_eps,
            sliding_window=config.window(index),
        )


class Qwen3Classifier(ScoreHead, Qwen3):
    """Qwen3 with a head for scores instead of tokens."""
