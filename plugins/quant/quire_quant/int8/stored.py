"""Layers of an `int-quantized` checkpoint: 8-bit weights with 8-bit inputs, or with wide ones."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.interfaces.quantization import (
    EmbeddingSpec,
    LinearSpec,
    QuantizedActivation,
    ShardRule,
    WeightLayer,
)
from quire_kernels import ops
from quire_kernels.cpu import products
from quire_quant.int8 import product
from quire_quant.int8.formats import Scheme
from quire_quant.int8.rounded import Int8Product
from quire_quant.module_names import part_names


class StoredInt8Product(Int8Product):
    """The product of `Int8Product` with a checkpoint's weight, scales and static input scales.

    A head that is tied to the embedding creates no weights: it multiplies with the embedding's.
    """

    def __init__(self, spec: LinearSpec | EmbeddingSpec, scheme: Scheme) -> None:
        if isinstance(spec, LinearSpec):
            sizes, inputs = spec.output_sizes, spec.in_features
        else:
            sizes, inputs = (spec.num_embeddings,), spec.embedding_dim
        super().__init__(sum(sizes), inputs, spec.dtype, spec.device)
        self.scheme = scheme
        self.sizes = sizes
        self.names = part_names(spec)
        self.is_tied = True
        self.row_sums: Tensor | None = None  # of the values, where inputs have zero points
        self.inputs: list[tuple[float, int]] = []  # a projection's scale and zero point, if static

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight` int8, `weight_scale` and, where they are static, those of inputs.

        They have no memory until they are filled.
        """
        self.is_tied = False
        weight = torch.empty(self.shape, dtype=torch.int8, device="meta")
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))
        each = ShardRule(output_dim=0, part_sizes=(1,) * len(self.sizes))
        if self.scheme.weight == "tensor":
            layer.add_weight("weight_scale", self._scale(len(self.sizes)), each)
        else:
            rule = ShardRule(output_dim=0)
            layer.add_weight("weight_scale", self._scale(self.shape[0], 1), rule)
        if self.scheme.inputs != "static":
            return
        layer.add_weight("input_scale", self._scale(len(self.sizes)), each)
        if not self.scheme.has_symmetric_inputs:
            zeros = torch.empty(len(self.sizes), dtype=torch.int8, device="meta")
            layer.add_weight("input_zero_point", zeros, each)

    def _scale(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    def finish_loading(self, layer: WeightLayer) -> None:
        """Check scales, give each output its own, and pack for oneDNN where it multiplies.

        Raises: CheckpointError naming a tensor with a scale that is not above 0.
        """
        if self.is_tied:
            return
        scales = layer.get_weight("weight_scale").data
        is_whole = self.scheme.weight == "tensor"
        self._check_positive("weight_scale", scales, [1] * len(self.sizes) if is_whole else None)
        if is_whole:
            sizes = torch.tensor(self.sizes, device=scales.device)
            scales = scales.repeat_interleave(sizes)
        self.scales = scales.flatten().contiguous()
        if self.scheme.inputs == "static":
            self._take_input_numbers(layer)
        values = layer.get_weight("weight").data
        if not self.scheme.has_symmetric_inputs:
            self.row_sums = values.sum(1, dtype=torch.int32).float()
        for name in ("weight", "weight_scale"):
            layer.drop_weight(name)
        self.values = self.repacked(values)

    def _take_input_numbers(self, layer: WeightLayer) -> None:
        scales = layer.get_weight("input_scale").data
        self._check_positive("input_scale", scales, [1] * len(self.sizes))
        zeros = [0] * len(self.sizes)
        if not self.scheme.has_symmetric_inputs:
            zeros = layer.get_weight("input_zero_point").tolist()
            layer.drop_weight("input_zero_point")
        # Kept on the host: a product reads them while its inputs are on their way.
        self.inputs = list(zip(scales.tolist(), zeros, strict=True))
        layer.drop_weight("input_scale")

    def _check_positive(self, name: str, scales: Tensor, counts: list[int] | None) -> None:
        if bool((scales > 0).all()):
            return
        parts = scales.split(counts or list(self.sizes))
        for part, found in zip(self.names, parts, strict=True):
            wrong = found[~(found > 0)]
            if wrong.numel():
                raise CheckpointError(
                    f"tensor '{part}.{name}' holds the scale {wrong[0].item():g}; scales must be "
                    "above 0. The file is damaged, or was not written by a tool for this format."
                )

    def loaded_bytes(self, layer: WeightLayer) -> int:
        """Return a byte a weight, four an output, and as many where inputs have zero points."""
        if self.is_tied:
            return 0
        found = super().loaded_bytes(layer)
        return found if self.scheme.has_symmetric_inputs else found + 4 * self.shape[0]

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Make scales that give weights about as large as others draw."""
        layer.get_weight("weight_scale").data.fill_(0.02 / 64)
        if self.scheme.inputs == "static":
            layer.get_weight("input_scale").data.fill_(1 / 32)

    @property
    def rounds_by_token(self) -> bool:
        """Whether the scheme is dynamic; a tied head rounds nothing."""
        return self.scheme.inputs == "token" and not self.is_tied

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Round the inputs as the scheme says, multiply, and scale back."""
        assert isinstance(x, Tensor)
        if self.is_tied:
            return ops.linear(x, layer.get_weight("weight"), bias)
        if self.scheme.inputs == "token" or x.shape[0] == 0:
            return super().apply(layer, x, bias)
        if len(set(self.inputs)) == 1:
            out = self._static(x, *self.inputs[0])
        else:  # calibrated apart, projections see other inputs
            outs = [self._static(x, *own).split(self.sizes, 1) for own in self.inputs]
            out = torch.cat([split[i] for i, split in enumerate(outs)], 1)
        if bias is not None:
            out = out.add_(bias)
        return out.to(x.dtype)

    def _static(self, x: Tensor, scale: float, zero: int) -> Tensor:
        """Return the product float32 of inputs rounded with one scale; of a row with NaN, NaN."""
        values, scales = self._loaded()
        rounded = _rounded(x, scale, zero).add_(product.ZERO_POINT).to(torch.uint8)
        if self.takes_tiles:
            out = products.int8_product(rounded, torch.full((len(x),), scale), values, scales)
        elif self.packs:
            out = product.multiply_packed(rounded, scale, values, scales, torch.float32)
        else:
            out = product.multiply(rounded, values, scales).mul_(scale)
        if self.row_sums is not None and zero:
            out -= zero * scale * self.row_sums * scales
        return out.masked_fill_(x.isnan().any(1, keepdim=True), float("nan"))

    def dequantize(self, layer: WeightLayer) -> Tensor:
        """Return values times scales, float32; a tied head's weight is not quantized."""
        if self.is_tied:
            return layer.get_weight("weight").float()
        return super().dequantize(layer)

    def rounded_input(self, layer: WeightLayer, x: Tensor) -> Tensor | None:
        """Return what is multiplied instead of `x`; None where projections see different."""
        if self.is_tied:
            return None
        if self.scheme.inputs == "token":
            return super().rounded_input(layer, x)
        if len(set(self.inputs)) > 1:
            return None
        scale, zero = self.inputs[0]
        return (_rounded(x, scale, zero).double() - zero) * scale


def _rounded(x: Tensor, scale: float, zero: int) -> Tensor:
    """Return whole numbers from -128 to 127 in float32; of NaN 0."""
    return (x.float() / scale + zero).clamp_(-128, 127).round_().nan_to_num_(0.0)
