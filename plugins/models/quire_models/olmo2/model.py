"""OLMo 2. Source: OLMo Team, "2 OLMo 2 Furious", 2024."""

from __future__ import annotations

from typing import ClassVar

from quire_models.decoder import DecoderForCausalLM, LayerOptions, NormsOnlyAfterLayer
from quire_models.decoder_config import DecoderConfig
from quire_models.norm import WideNorm
from quire_models.olmo2 import Olmo2Config


class Olmo2(DecoderForCausalLM):
    """Llama with its norms behind attention and MLP, and on q and k over all heads."""

    layer_class: ClassVar = NormsOnlyAfterLayer

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the norms and the biases of attention."""
        assert isinstance(config, Olmo2Config), type(config)
        return LayerOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            norms_qk="whole",
            norm=WideNorm,
        )
