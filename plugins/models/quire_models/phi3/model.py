"""Phi-3 and Phi-4. Source: Abdin et al., "Phi-3 technical report", 2024."""

from __future__ import annotations

from quire_models.decoder import DecoderForCausalLM, LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.phi3 import Phi3Config


class Phi3(DecoderForCausalLM):
    """Llama whose files hold q, k and v as one tensor; a part of a head may be rotated."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return how the files are, and the window."""
        assert isinstance(config, Phi3Config), type(config)
        return LayerOptions(is_fused=True, sliding_window=config.sliding_window)
