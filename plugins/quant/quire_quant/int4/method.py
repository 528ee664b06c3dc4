"""Round linear weights to 4 bits once they are loaded; asymmetric, in groups along the inputs."""

from __future__ import annotations

import torch

from quire.interfaces.quantization import (
    EmbeddingSpec,
    ExpertsMethod,
    ExpertsSpec,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
    ShardRule,
    WeightLayer,
)
from quire_quant.config_values import multiple_needed
from quire_quant.module_names import is_router
from quire_quant.packed import PackedForm, PackedProduct, check_scales, num_bytes, pack
from quire_quant.packed_experts import experts_method, why_not_experts
from quire_quant.rounding import quantize

BITS = 4
GROUP_SIZES = (128, 64, 32, 16)


def _group_size(in_features: int) -> int | None:
    """Return the largest group that divides the inputs."""
    return next((size for size in GROUP_SIZES if in_features % size == 0), None)


class Int4Product(PackedProduct):
    """A weight of the checkpoint, rounded when it is there."""

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight` [out_features, in_features] in the model's dtype, without memory."""
        form = self.form
        shape, dtype = (form.out_features, form.in_features), getattr(torch, form.dtype)
        weight = torch.empty(shape, dtype=dtype, device="meta")
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))

    def loaded_bytes(self, layer: WeightLayer) -> int | None:
        """Return the bytes of values, scales and zeros."""
        form = self.form
        rows, groups = form.out_features, form.num_groups
        return rows * form.in_features // 2 + groups * (2 * rows + num_bytes(rows, BITS))

    def finish_loading(self, layer: WeightLayer) -> None:
        """Round a slice of outputs at a time, and drop the weight."""
        form, weight = self.form, layer.get_weight("weight").data
        rows, groups = form.out_features, form.num_groups
        values = weight.new_empty(rows, form.in_features // 2, dtype=torch.uint8)
        scales = weight.new_empty(groups, rows, dtype=torch.float16)
        zeros = weight.new_empty(groups, rows, dtype=torch.uint8)
        for outputs in form.pieces():
            rounded = quantize(
                weight[outputs].float(), BITS, form.group_size, getattr(torch, form.dtype)
            )
            values[outputs] = pack(rounded[0], BITS)
            scales[:, outputs], zeros[:, outputs] = rounded[1].T, rounded[2].T
        check_scales(layer, scales, form, "weight")
        layer.drop_weight("weight")
        self.install(layer, values=values, scales=scales, zeros=pack(zeros, BITS))


class Int4(QuantizationMethod):
    """Round linears; leave embeddings and heads in the model's dtype."""

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Serve linears whose inputs make whole groups."""
        if isinstance(spec, EmbeddingSpec):
            return None
        if isinstance(spec, ExpertsSpec):
            return why_not_experts(self, spec)
        if not isinstance(spec, LinearSpec):
            return f"it has no method for {type(spec).__name__}"
        if is_router(spec.name):
            return None
        return multiple_needed("its inputs", spec.in_features, GROUP_SIZES[-1])

    def method_for(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod | None:
        """Return the product of a linear that is no router, or of experts."""
        if isinstance(spec, ExpertsSpec):
            return experts_method(self, spec)
        if not isinstance(spec, LinearSpec) or is_router(spec.name):
            return None
        return Int4Product(PackedForm.of(spec, BITS, _group_size(spec.in_features)))
