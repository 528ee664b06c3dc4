"""Gemma 2 and 3. Source: Gemma Team, "Gemma 2", 2024, and "Gemma 3 technical report", 2025."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from attrs import evolve
from torch import Tensor

from quire.interfaces.model import BuildContext
from quire_kernels import ops
from quire_models.decoder import DecoderForCausalLM, LayerOptions, NormsAfterLayer
from quire_models.decoder_config import DecoderConfig
from quire_models.gemma import Gemma2Config, Gemma3Config, GemmaConfig
from quire_models.gemma.part import Within, names_of_part
from quire_models.norm import OffsetNorm


class Gemma(DecoderForCausalLM):
    """Norms before and behind attention and MLP; embeddings times sqrt(hidden_size)."""

    layer_class: ClassVar = NormsAfterLayer

    def __init__(self, config: GemmaConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        # Rounded to float32 and to the model's dtype, as it was trained.
        scale = torch.tensor(config.hidden_size**0.5, dtype=torch.float32)
        self.embedding_scale = float(scale.to(build.dtype))
        self.cap = config.final_logit_softcapping
        self.is_invariant = build.batch_invariant

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return what layers of all versions have."""
        assert isinstance(config, GemmaConfig), type(config)
        return LayerOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5,
            sliding_window=config.sliding_window if config.is_sliding(index) else None,
            is_gelu=True,
            norm=OffsetNorm,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the scaled embeddings of int32 `token_ids` [num_tokens]."""
        return super().embed(token_ids) * self.embedding_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the capped logits [num_rows, vocab_size]."""
        logits = super().logits(hidden)
        if self.cap is None:
            return logits
        return ops.soft_cap(logits, self.cap, batch_invariant=self.is_invariant)


class Gemma2(Gemma):
    """Scores of attention are capped too."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the cap as well."""
        assert isinstance(config, Gemma2Config), type(config)
        cap = config.attn_logit_softcapping
        return evolve(Gemma.layer_options(config, index), logit_softcap=cap)


class Gemma3(Gemma):
    """q and k are normed head by head; layers with a window rotate with a base of their own."""

    def __init__(self, config: Gemma3Config, build: BuildContext) -> None:
        within: Any = Within(build) if config.is_part else build
        super().__init__(config, within)
        if config.is_part:
            self.weight_names = names_of_part(self.weight_names)  # type: ignore[misc]

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the norms and the rotation as well."""
        assert isinstance(config, Gemma3Config), type(config)
        rope = config.local_rope if config.is_sliding(index) else config.rope
        return evolve(Gemma.layer_options(config, index), norms_qk="head", rope=rope)
