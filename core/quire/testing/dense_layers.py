"""The kit's own layers: weights in the layer's dtype, products in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from quire.interfaces.quantization import (
    EmbeddingSpec,
    ExpertsMethod,
    ExpertsSpec,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
    QuantizedActivation,
    ShardRule,
    WeightLayer,
)


class PlainWeight(LayerMethod):
    """A weight [out_features, in_features] that multiplies, or is looked up."""

    def __init__(self, shape: tuple[int, int], spec: LinearSpec | EmbeddingSpec) -> None:
        self.shape = shape
        self.spec = spec
        self.batch_invariant = spec.batch_invariant  # type: ignore[misc]
        self.looks_up = isinstance(spec, EmbeddingSpec) and not spec.is_head

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight`."""
        dtype = getattr(torch, self.spec.dtype)
        weight = torch.empty(self.shape, dtype=dtype, device=self.spec.device)
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Multiply or look up."""
        assert isinstance(x, Tensor)
        weight = layer.get_weight("weight")
        if self.looks_up:
            return functional.embedding(x, weight)
        if self.batch_invariant and len(x):
            return torch.cat([functional.linear(row.clone(), weight, bias) for row in x.split(1)])
        return functional.linear(x, weight, bias)


class PlainExperts(ExpertsMethod):
    """Weights [num_experts, outputs, inputs]; every expert sees every token."""

    def __init__(self, spec: ExpertsSpec) -> None:
        self.spec = spec

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `gate_up_weight` and `down_weight`."""
        spec, dtype = self.spec, getattr(torch, self.spec.dtype)
        rule = ShardRule(output_dim=1, input_dim=2)
        sizes = {
            "gate_up_weight": (2 * spec.intermediate_size, spec.hidden_size),
            "down_weight": (spec.hidden_size, spec.intermediate_size),
        }
        for name, shape in sizes.items():
            weight = torch.empty(spec.num_experts, *shape, dtype=dtype, device=spec.device)
            layer.add_weight(name, weight, rule)

    def apply_experts(
        self, layer: WeightLayer, x: Tensor, weights: Tensor, expert_ids: Tensor
    ) -> Tensor:
        """Multiply by all experts, and weigh those that were chosen."""
        gate, up = torch.einsum("ni,eoi->eno", x, layer.get_weight("gate_up_weight")).chunk(2, -1)
        made = torch.einsum(
            "eno,eho->enh", functional.silu(gate) * up, layer.get_weight("down_weight")
        )
        tokens = torch.arange(len(x), device=x.device).unsqueeze(1)
        return (made[expert_ids, tokens] * weights.unsqueeze(-1)).sum(1).to(x.dtype)


class PlainWeights(QuantizationMethod):
    """Leave every linear, embedding, head and mixture as it is."""

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Serve what there is a weight for."""
        served = (LinearSpec, EmbeddingSpec, ExpertsSpec)
        return None if isinstance(spec, served) else "the kit has none"

    def method_for(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod | None:
        """Return a plain weight."""
        if isinstance(spec, ExpertsSpec):
            return PlainExperts(spec)
        if isinstance(spec, LinearSpec):
            return PlainWeight((spec.out_features, spec.in_features), spec)
        if isinstance(spec, EmbeddingSpec):
            return PlainWeight((spec.num_embeddings, spec.embedding_dim), spec)
        return None
