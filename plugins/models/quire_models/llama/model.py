"""Llama and Mistral. Source: Touvron et al., "LLaMA", 2023; Jiang et al., "Mistral 7B", 2023."""

from __future__ import annotations

from quire_models.decoder import DecoderForCausalLM, LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.llama import LlamaConfig, MistralConfig
from quire_models.score_head import ScoreHead


class Llama(DecoderForCausalLM):
    """The plain decoder; a config may ask for biases everywhere."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the biases."""
        assert isinstance(config, LlamaConfig), type(config)
        return LayerOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
        )


class Mistral(DecoderForCausalLM):
    """Llama with a sliding window in every layer."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the window."""
        assert isinstance(config, MistralConfig), type(config)
        return LayerOptions(sliding_window=config.sliding_window)


class LlamaClassifier(ScoreHead, Llama):
    """Llama with a head for scores instead of tokens."""


class MistralClassifier(ScoreHead, Mistral):
    """Mistral with a head for scores instead of tokens."""
