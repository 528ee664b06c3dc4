"""Qwen2. Source: Yang et al., "Qwen2 technical report", 2024."""

from __future__ import annotations

from quire_models.decoder import DecoderForCausalLM, LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.qwen2 import Qwen2Config
from quire_models.score_head import ScoreHead


class Qwen2(DecoderForCausalLM):
    """Llama with biases on q, k and v and, where a config asks, windows in some layers."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the biases and the layer's window."""
        assert isinstance(config, Qwen2Config), type(config)
        return LayerOptions(qkv_bias=True, sliding_window=config.window(index))


class Qwen2Classifier(ScoreHead, Qwen2):
    """Qwen2 with a head for scores instead of tokens."""
