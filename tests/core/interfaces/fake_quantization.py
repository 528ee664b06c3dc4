"""A fake 4-bit method: eight outputs share an element, a group of inputs shares a scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.interfaces.quantization import (
    EmbeddingSpec,
    ExpertsSpec,
    KVCacheSpec,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
    QuantizedActivation,
    ShardRule,
    WeightLayer,
)

PACK, GROUP = 8, 16
SHIFTS = torch.arange(PACK) * 4


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int32 [in, out / 8] and float32 scales [in / 16, out] of a weight [out, in]."""
    groups = weight.T.unflatten(0, (-1, GROUP))
    scales = groups.abs().amax(1) / 7
    values = (groups / scales.unsqueeze(1)).round().flatten(0, 1).long() + 8
    packed = (values.unflatten(1, (-1, PACK)) << SHIFTS).sum(-1)
    return packed.to(torch.int32), scales


def unpack(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the weight [out, in] that was packed, rounded."""
    values = (packed.unsqueeze(-1).long() >> SHIFTS) & 15
    groups = (values.flatten(1) - 8).unflatten(0, (-1, GROUP))
    return (groups * scales.unsqueeze(1)).flatten(0, 1).T.contiguous()


class PackedProduct(LayerMethod):
    """A linear layer of packed weights, whose input comes quantized."""

    activation_format: ClassVar[str | None] = "fake-int16-per-token"

    def __init__(self, spec: LinearSpec) -> None:
        assert spec.in_features % GROUP == 0
        assert len(spec.parts) == len(spec.output_sizes)
        self.spec = spec

    def create_weights(self, layer: WeightLayer) -> None:
        """Register packed weights and scales; fused parts have scales of their own."""
        spec = self.spec
        rows, device = sum(spec.output_sizes), spec.device
        packed = torch.empty(spec.in_features, rows // PACK, dtype=torch.int32, device=device)
        scales = torch.empty(spec.in_features // GROUP, rows, device=device)
        rule = ShardRule(output_dim=1, input_dim=0, packed_dim=1, pack_factor=PACK)
        layer.add_weight("qweight", packed, rule)
        layer.add_weight("scales", scales, ShardRule(output_dim=1, input_dim=0, group_size=GROUP))

    def finish_loading(self, layer: WeightLayer) -> None:
        """Repack: two weights go, one comes."""
        weight = unpack(layer.get_weight("qweight"), layer.get_weight("scales"))
        layer.drop_weight("qweight")
        layer.drop_weight("scales")
        layer.add_weight("unpacked", weight.to(getattr(torch, self.spec.dtype)), ShardRule())

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Return the product of a quantized activation."""
        assert isinstance(x, QuantizedActivation)
        assert (bias is not None) == self.spec.bias
        full = x.values.float() * x.scales
        return torch.nn.functional.linear(full, layer.get_weight("unpacked"), bias)


class FakeQuantization(QuantizationMethod):
    """Pack linears but those that the config leaves out; leave embeddings and head alone."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.asked: list[LayerSpec] = []

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Say which experts and caches it cannot serve, and that no row is the same anywhere."""
        if not isinstance(spec, KVCacheSpec) and spec.batch_invariant:
            return f"{spec.name}: no batch invariance"
        if isinstance(spec, ExpertsSpec):
            sizes = f"{spec.num_experts} experts of {spec.hidden_size} x {spec.intermediate_size}"
            parts = f"{spec.top_k} a token, of {', '.join(spec.parts)}"
            return f"{spec.name}: no {sizes} ({parts}) in {spec.dtype} on {spec.device}"
        if isinstance(spec, KVCacheSpec) and spec.kv_dtype != "fake-fp8":
            return f"{spec.name}: no {spec.kv_dtype}"
        return None

    def method_for(self, spec: LayerSpec) -> LayerMethod | None:
        """Return a method, or None to leave the layer in the model's dtype."""
        self.asked.append(spec)
        if isinstance(spec, EmbeddingSpec):
            assert spec.num_embeddings > 0
            assert spec.embedding_dim % GROUP == 0
            assert (spec.name == "lm_head") == spec.is_head
            assert (spec.dtype, spec.device) in (("float32", "cpu"), ("float32", "meta"))
            return None
        if isinstance(spec, KVCacheSpec):
            return ScaledCache(spec)
        assert isinstance(spec, LinearSpec), spec
        return None if spec.name in self.config["excluded"] else PackedProduct(spec)


class ScaledCache(LayerMethod):
    """The scales of a quantized KV cache: one number a head, as `AttentionLayer` has them."""

    def __init__(self, spec: KVCacheSpec) -> None:
        self.shape = (spec.num_kv_heads,)
        self.elements = spec.num_kv_heads * spec.head_dim

    def create_weights(self, layer: WeightLayer) -> None:
        """Register the two scales."""
        for name in ("k_scale", "v_scale"):
            layer.add_weight(name, torch.ones(self.shape), ShardRule(output_dim=0))

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """A cache has no product."""
        raise NotImplementedError
