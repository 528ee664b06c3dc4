"""Weights of 8 bits that are multiplied with inputs as they are (W8A16), as packed ones are."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.interfaces.quantization import (
    EmbeddingSpec,
    LinearSpec,
    ShardRule,
    WeightLayer,
)
from quire_quant.int8.formats import Scheme
from quire_quant.narrow_scales import narrow_scales
from quire_quant.packed import (
    PackedForm,
    PackedProduct,
    TiedPackedProduct,
    check_scales,
    held_bytes,
)

MIDDLE = 128


class StoredWeightOnly(TiedPackedProduct):
    """A checkpoint's weight int8 with a scale a projection, an output or a group of inputs."""

    def __init__(self, spec: LinearSpec | EmbeddingSpec, scheme: Scheme) -> None:
        super().__init__(PackedForm.of(spec, 8, scheme.group_size))
        self.scheme = scheme

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight` int8 and `weight_scale`, without memory until they are filled."""
        form, self.is_tied = self.form, False
        shape = (form.out_features, form.in_features)
        weight = torch.empty(shape, dtype=torch.int8, device="meta")
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))
        parts = len(form.part_sizes)
        if self.scheme.weight == "tensor":
            rule = ShardRule(output_dim=0, part_sizes=(1,) * parts)
            scales = torch.empty(parts, dtype=torch.float32, device="meta")
        else:
            rule = ShardRule(output_dim=0, input_dim=1, group_size=form.group_size)
            shape = (form.out_features, form.num_groups)
            scales = torch.empty(shape, dtype=torch.float32, device="meta")
        layer.add_weight("weight_scale", scales, rule)

    def finish_loading(self, layer: WeightLayer) -> None:
        """Make codes above 0. Raises: CheckpointError naming a scale that float16 cannot hold."""
        if self.is_tied:
            return
        form = self.form
        if self.scheme.weight == "tensor":
            scales = layer.get_weight("weight_scale").data
            sizes = torch.tensor(form.part_sizes, device=scales.device)
            each = scales.repeat_interleave(sizes)[:, None]
            layer.drop_weight("weight_scale")
            layer.add_weight("weight_scale", each, ShardRule(output_dim=0))
        narrow = narrow_scales(layer, form)
        values = layer.get_weight("weight").data.view(torch.uint8) ^ MIDDLE
        for name in ("weight", "weight_scale"):
            layer.drop_weight(name)
        self.install(layer, values=values, scales=narrow, zeros=middle_zeros(narrow))

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Make scales that give weights about as large as others draw."""
        layer.get_weight("weight_scale").data.fill_(2.0**-12)

    def loaded_bytes(self, layer: WeightLayer) -> int:
        """Return the bytes of values, scales and zeros."""
        return 0 if self.is_tied else held_bytes(self.form)


class RoundedWeightOnly(PackedProduct):
    """A full-precision weight, rounded with the scale of each output's largest once it is there."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(PackedForm.of(spec, 8, None))

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight` [out_features, in_features] in the model's dtype, without memory."""
        form = self.form
        shape, dtype = (form.out_features, form.in_features), getattr(torch, form.dtype)
        weight = torch.empty(shape, dtype=dtype, device="meta")
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))

    def loaded_bytes(self, layer: WeightLayer) -> int:
        """Return the bytes of values, scales and zeros."""
        return held_bytes(self.form)

    def finish_loading(self, layer: WeightLayer) -> None:
        """Round some outputs at a time, and drop the weight.

        Raises: CheckpointError naming the weight where one is not finite.
        """
        form, weight = self.form, layer.get_weight("weight").data
        values = weight.new_empty(weight.shape, dtype=torch.uint8)
        scales = weight.new_empty(1, form.out_features, dtype=torch.float16)
        for outputs in form.pieces():
            wide = weight[outputs].float()
            scale = _narrowed(wide.abs().amax(1) / (MIDDLE - 1))
            codes = (wide / scale.float()[:, None]).round_().clamp_(1 - MIDDLE, MIDDLE - 1)
            values[outputs], scales[0, outputs] = (codes + MIDDLE).to(torch.uint8), scale
        check_scales(layer, scales, form, "weight")
        layer.drop_weight("weight")
        self.install(layer, values=values, scales=scales, zeros=middle_zeros(scales))


def _narrowed(exact: Tensor) -> Tensor:
    """Return scales as float16: rounded down, so that no step is larger than the largest by 127.

    What that cuts off the largest weight is less than half a step. The smallest scales, of which
    it would be more, are rounded up.
    """
    unit = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    units = exact / unit
    small = torch.where(units < 2 * MIDDLE, units.ceil().clamp_(min=1), units.floor()).mul_(unit)
    is_small = exact < torch.finfo(torch.float16).smallest_normal
    return torch.where(is_small, small, exact * (1 - 2**-11)).to(torch.float16)


def middle_zeros(scales: Tensor) -> Tensor:
    """Return the zero points of symmetric codes, uint8 of the scales' shape."""
    return torch.full(scales.shape, MIDDLE, dtype=torch.uint8, device=scales.device)
