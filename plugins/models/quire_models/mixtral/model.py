"""Mixtral. Source: Jiang et al., "Mixtral of experts", 2024."""

from __future__ import annotations

from typing import ClassVar

from quire_models.decoder import DecoderForCausalLM, LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.mixtral import MixtralConfig
from quire_models.mixture import MixtureOptions


class Mixtral(DecoderForCausalLM):
    """Mistral with experts in every layer."""

    # An expert's product has as many rows as tokens chose it.
    batch_invariant: ClassVar[bool] = False

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the window and the experts."""
        assert isinstance(config, MixtralConfig), type(config)
        mixture = MixtureOptions(
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            size=config.intermediate_size,
            normalised=True,
            name="block_sparse_moe",
            parts=("w1", "w3", "w2"),
        )
        return LayerOptions(sliding_window=config.sliding_window, mixture=mixture)
