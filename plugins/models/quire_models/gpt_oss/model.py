"""gpt-oss. Source: OpenAI, "gpt-oss-120b and gpt-oss-20b model card", 2025."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from quire.errors import ConfigError
from quire.interfaces.model import BuildContext
from quire.layers.weights import WeightStore
from quire_kernels import ops
from quire_models.decoder import DecoderForCausalLM, LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.gpt_oss import MXFP4, GptOssConfig
from quire_models.gpt_oss.mxfp4 import Mxfp4Weights, StackedSpec
from quire_models.norm import Norm


class ClampedExperts(nn.Module):
    """The weights of all experts, [num_experts, inputs, outputs], gates and ups in turns."""

    gate_up_proj: Tensor
    gate_up_proj_bias: Tensor
    down_proj: Tensor
    down_proj_bias: Tensor
    alpha: float
    limit: float

    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """Return weighted sums, [num_tokens, hidden_size]."""
        return ops.clamped_experts(
            x,
            (self.gate_up_proj, self.gate_up_proj_bias),
            (self.down_proj, self.down_proj_bias),
            weights,
            expert_ids,
            alpha=self.alpha,
            limit=self.limit,
        )


class BiasedExperts(ClampedExperts):
    """Experts of a file in 16 bits."""

    def __init__(self, config: GptOssConfig, build: BuildContext) -> None:
        super().__init__()
        experts, hidden = config.num_local_experts, config.hidden_size
        size = config.intermediate_size
        self.gate_up_proj = build.parameter(experts, hidden, 2 * size)
        self.gate_up_proj_bias = build.parameter(experts, 2 * size)
        self.down_proj = build.parameter(experts, size, hidden)
        self.down_proj_bias = build.parameter(experts, hidden)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit


class Mxfp4Experts(ClampedExperts, WeightStore):
    """Experts of a file in MXFP4, wide once they are loaded."""

    def __init__(self, name: str, config: GptOssConfig, build: BuildContext) -> None:
        hidden, size = config.hidden_size, config.intermediate_size
        spec = StackedSpec(
            name=name,
            num_experts=config.num_local_experts,
            sizes={"gate_up_proj": (hidden, 2 * size), "down_proj": (size, hidden)},
            dtype=build.dtype,
            device=build.device,
        )
        WeightStore.__init__(self, spec, Mxfp4Weights(spec))
        self.method.create_weights(self)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit


class BiasedMixture(nn.Module):
    """A router with a bias, and experts with biases."""

    def __init__(self, config: GptOssConfig, name: str, hidden: int, build: BuildContext) -> None:
        super().__init__()
        why_not = ops.why_no_experts(str(build.device))
        if why_not is not None:
            raise ConfigError(f"gpt-oss cannot be served on {build.device}: {why_not}.")
        experts = config.num_local_experts
        self.router = build.linear(f"{name}.mlp.router", hidden, experts, bias=True)
        self.experts: ClampedExperts
        if config.quantization == MXFP4:
            self.experts = Mxfp4Experts(f"{name}.mlp.experts", config, build)
        else:
            self.experts = BiasedExperts(config, build)
        self.top_k = config.num_experts_per_tok

    def forward(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return what is made of the normalised sum, [num_tokens, hidden_size], and the sum."""
        normed, total = norm.add(x, residual)
        weights, expert_ids = ops.route(self.router(normed), self.top_k, normalise=True)
        out: Tensor = self.experts(normed, weights, expert_ids)
        return out, total


class GptOss(DecoderForCausalLM):
    """Sinks in every head, windows in every second layer, experts with a clamped gate."""

    # An expert's product has as many rows as tokens chose it.
    batch_invariant: ClassVar[bool] = False

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return the biases, the sinks, the layer's window and its experts."""
        assert isinstance(config, GptOssConfig), type(config)
        return LayerOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            sliding_window=config.window(index),
            sinks=True,
            make_mlp=partial(BiasedMixture, config),
        )
