"""DeepSeek-V2 and V3. Source: DeepSeek-AI, "DeepSeek-V2", 2024, "DeepSeek-V3", 2024."""

from __future__ import annotations

from typing import ClassVar

from attrs import evolve

from quire.interfaces.model import BuildContext, WeightNames
from quire.layers.rotary import PairedRotaryTable, RotaryTable
from quire_kernels import ops
from quire_models.decoder import DecoderForCausalLM, LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.deepseek import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from quire_models.latent import LatentSizes
from quire_models.mixture import MixtureOptions


class DeepseekV2(DecoderForCausalLM):
    """Latent attention, and experts chosen by their softmax, in all layers but the first."""

    # An expert's product has as many rows as tokens chose it.
    batch_invariant: ClassVar[bool] = False

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the layer's attention, and its experts."""
        assert isinstance(config, DeepseekV2Config), type(config)
        return LayerOptions(
            mlp_bias=config.mlp_bias,
            latent=latent_sizes(config),
            rotary_table=PairedRotaryTable,
            mixture=mixture_of(config, index, bias=config.mlp_bias),
        )


class DeepseekV3(DecoderForCausalLM):
    """Latent attention, and experts chosen by their sigmoid and a bias in the best groups."""

    batch_invariant: ClassVar[bool] = False

    def __init__(self, config: DeepseekV3Config, build: BuildContext) -> None:
        super().__init__(config, build)
        # Modules that predict further tokens follow the last layer, under the names of layers, with
        # a projection of their own. Without it they are layers that config.json does not know of.
        first, names = config.num_hidden_layers, type(self).weight_names
        further = {
            rf"model\.layers\.{index}\..*": rf"model\.layers\.{index}\.eh_proj\..*"
            for index in range(first, first + (config.num_nextn_predict_layers or 0))
        }
        self.weight_names: WeightNames = evolve(names, ignored_with=further)  # type: ignore[misc]

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the layer's attention, and its experts."""
        assert isinstance(config, DeepseekV3Config), type(config)
        return LayerOptions(
            latent=latent_sizes(config),
            rotary_table=PairedRotaryTable if config.rope_interleave else RotaryTable,
            mixture=mixture_of(config, index, scoring="sigmoid", normalised=config.norm_topk_prob),
        )


def latent_sizes(config: DeepseekConfig) -> LatentSizes:
    """Return the sizes of all layers' attention."""
    return LatentSizes(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        bias=config.attention_bias,
        scale=config.scale,
    )


def mixture_of(
    config: DeepseekConfig,
    index: int,
    *,
    scoring: str = "softmax",
    normalised: bool = False,
    bias: bool = False,
) -> MixtureOptions | None:
    """Return the experts of a layer; None: it has one MLP."""
    if not config.has_experts(index):
        return None
    assert config.num_experts_per_tok is not None, "it was checked"
    groups = ops.GroupChoice(
        scoring=scoring,
        num_groups=(config.n_group or 1) if config.has_groups else 1,
        top_groups=(config.topk_group or 1) if config.has_groups else 1,
        normalised=normalised,
        scale=config.routed_scaling_factor,
    )
    shared = config.n_shared_experts
    return MixtureOptions(
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        size=config.moe_intermediate_size,
        normalised=normalised,
        shared_size=shared * config.moe_intermediate_size if shared else None,
        groups=groups,
        shared_bias=bias,
    )
