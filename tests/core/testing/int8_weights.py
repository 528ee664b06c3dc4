"""Two right quantization methods: int8 made on the fly, and a format of packed 4-bit numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from quire.interfaces.quantization import (
    EncodedWeight,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
    ShardRule,
    WeightLayer,
)


class Int8Product(LayerMethod):
    """x (scale q)^T + b, a scale an output; made of the plain weight once it is loaded."""

    batch_invariant = True

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self.dtype = getattr(torch, spec.dtype)

    def create_weights(self, layer: WeightLayer) -> None:
        shape = (self.spec.out_features, self.spec.in_features)
        weight = torch.empty(shape, dtype=self.dtype, device=self.spec.device)
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))

    def scales_of(self, weight: Tensor) -> Tensor:
        return weight.abs().amax(1, keepdim=True).clamp_(min=1e-30) / 127

    def finish_loading(self, layer: WeightLayer) -> None:
        weight = layer.get_weight("weight").data.float()
        scales = self.scales_of(weight)
        layer.drop_weight("weight")
        values = (weight / scales).round_().clamp_(-127, 127).to(torch.int8)
        layer.add_weight("values", values, ShardRule(output_dim=0, input_dim=1))
        layer.add_weight("scales", scales, ShardRule(output_dim=0))

    def dequantize(self, layer: WeightLayer) -> Tensor | None:
        return layer.get_weight("values").float() * layer.get_weight("scales")

    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        # One row at a time: the same bits whatever else is in the batch.
        # Each where memory is aligned, which a product may depend on, too.
        rows = [row.clone() @ weight.T for row in x.float().split(1)]
        return torch.cat(rows) if rows else x.float() @ weight.T

    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        weight = self.dequantize(layer)
        assert weight is not None
        out = self.multiplied(x, weight)
        return (out if bias is None else out + bias.float()).to(self.dtype)


class Int8(QuantizationMethod):
    """Linears in int8, the rest left alone."""

    product: ClassVar[type[Int8Product]] = Int8Product

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        return None

    def method_for(self, spec: LayerSpec) -> LayerMethod | None:
        if not isinstance(spec, LinearSpec) or spec.name in self.config.get("ignore", ()):
            return None
        return self.product(spec)


class HiddenInt8Product(Int8Product):
    """The same without reading back: the kit bounds it by the format's rounding."""

    batch_invariant = False

    def dequantize(self, layer: WeightLayer) -> Tensor | None:
        return None

    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        weight = layer.get_weight("values").float() * layer.get_weight("scales")
        return functional.linear(x.float(), weight, None if bias is None else bias.float()).to(
            self.dtype
        )


class HiddenInt8(Int8):
    product = HiddenInt8Product


GROUP = 16


class PackedProduct(LayerMethod):
    """Two 4-bit numbers a byte, a float32 scale for 16 inputs, as the checkpoint has them."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    def create_weights(self, layer: WeightLayer) -> None:
        rows, columns = self.spec.out_features, self.spec.in_features
        device = self.spec.device
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
        rule = ShardRule(output_dim=0, input_dim=1, packed_dim=1, pack_factor=2)
        layer.add_weight("weight_packed", packed, rule)
        scales = torch.empty(rows, columns // GROUP, device=device)
        rule = ShardRule(output_dim=0, input_dim=1, group_size=GROUP)
        layer.add_weight("weight_scale", scales, rule)

    def unpacked(self, packed: Tensor) -> Tensor:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(1)

    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        values = self.unpacked(layer.get_weight("weight_packed")).float() - 8
        scales = layer.get_weight("weight_scale").repeat_interleave(GROUP, 1)
        out = functional.linear(x.float(), values * scales)
        return (out if bias is None else out + bias.float()).to(x.dtype)


class Packed(QuantizationMethod):
    """A checkpoint format of packed 4-bit numbers."""

    example_config: ClassVar[Mapping[str, Any]] = {"group_size": GROUP}
    product: ClassVar[type[PackedProduct]] = PackedProduct

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        if isinstance(spec, LinearSpec) and spec.in_features % GROUP:
            return f"groups of {GROUP} do not divide {spec.in_features} inputs"
        return None

    def method_for(self, spec: LayerSpec) -> LayerMethod | None:
        return self.product(spec) if isinstance(spec, LinearSpec) else None

    @classmethod
    def encode(cls, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        grouped = weight.unflatten(1, (-1, GROUP))
        scales = grouped.abs().amax(-1) / 7
        values = (grouped / scales[..., None]).round().clamp(-8, 7).flatten(1)
        codes = (values + 8).to(torch.uint8)
        return EncodedWeight(
            tensors={
                "weight_packed": codes[:, ::2] | (codes[:, 1::2] << 4),
                "weight_scale": scales,
            },
            weight=values.double() * scales.double().repeat_interleave(GROUP, 1),
        )
