"""A layer of a `pack-quantized` checkpoint: what it reads, and how that is repacked."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.interfaces.quantization import ShardRule, WeightLayer
from quire_quant.input_order import input_order, plain_indices, reorder
from quire_quant.narrow_scales import narrow_scales
from quire_quant.packed import (
    PackedForm,
    TiedPackedProduct,
    as_bytes,
    held_bytes,
    pack,
    settle_scales,
    spans_of,
    tensor_name,
)


class PackQuantizedProduct(TiedPackedProduct):
    """Codes of an output lie along the inputs in int32, those below the middle being negative."""

    def __init__(self, form: PackedForm, *, symmetric: bool, has_order: bool) -> None:
        super().__init__(form)
        self.symmetric = symmetric
        self.has_order = has_order

    def create_weights(self, layer: WeightLayer) -> None:
        """Register the checkpoint's tensors; scales in float32, whose range holds them all.

        They have no memory until they are filled.
        """
        form, bits = self.form, self.form.bits
        self.is_tied = False
        groups, outputs, inputs = form.num_groups, form.out_features, form.in_features
        parts, per_word = len(form.part_sizes), 32 // bits
        rule = ShardRule(output_dim=0, input_dim=1, packed_dim=1, pack_factor=per_word)
        layer.add_weight("weight_packed", self._empty(outputs, inputs // per_word), rule)
        rule = ShardRule(output_dim=0, input_dim=1, group_size=form.group_size)
        scales = self._empty(outputs, groups, dtype=torch.float32)
        layer.add_weight("weight_scale", scales, rule)
        shapes = self._empty(2 * parts, dtype=torch.int64)
        layer.add_weight("weight_shape", shapes, ShardRule(output_dim=0, part_sizes=(2,) * parts))
        if not self.symmetric:
            rule = ShardRule(
                output_dim=0,
                input_dim=1,
                packed_dim=0,
                pack_factor=per_word,
                group_size=form.group_size,
            )
            layer.add_weight("weight_zero_point", self._empty(outputs // per_word, groups), rule)
        if self.has_order:
            # Each projection has one of its own, end to end here.
            rule = ShardRule(output_dim=0, part_sizes=(inputs,) * parts)
            layer.add_weight("weight_g_idx", self._empty(parts * inputs), rule)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def finish_loading(self, layer: WeightLayer) -> None:
        """Repack.

        Raises: CheckpointError naming a tensor: a shape that is not the layer's, a scale that
        float16 cannot hold, groups out of range or of another size than the config's.
        """
        if self.is_tied:
            return
        form = self.form
        self._check_shapes(layer)
        scales = narrow_scales(layer, form)
        order = None
        if self.has_order:
            indices = layer.get_weight("weight_g_idx").data
            order = input_order(indices, form, layer.spec, "weight_g_idx")
        values = layer.get_weight("weight_packed").data.view(torch.uint8)
        zeros = self._zeros(layer)
        for name in self._names:
            layer.drop_weight(name)
        for span, own in spans_of(form, order):
            if own is not None:
                reorder(values, span, own, form)
        self.install(layer, values=values, scales=scales, zeros=zeros, order=order)

    @property
    def _names(self) -> list[str]:
        names = ["weight_packed", "weight_scale", "weight_shape"]
        names += [] if self.symmetric else ["weight_zero_point"]
        return names + (["weight_g_idx"] if self.has_order else [])

    def _check_shapes(self, layer: WeightLayer) -> None:
        given = layer.get_weight("weight_shape").data.view(-1, 2).tolist()
        for part, (found, size) in enumerate(zip(given, self.form.part_sizes, strict=True)):
            if found != [size, self.form.in_features]:
                raise CheckpointError(
                    f"tensor {tensor_name(layer.spec, part, 'weight_shape')!r} says {found}; "
                    f"config.json makes this projection {[size, self.form.in_features]}. The two "
                    "are not of one checkpoint; download it again."
                )

    def _zeros(self, layer: WeightLayer) -> Tensor:
        """Return the zero points as `install` wants them; symmetric codes have the middle."""
        form = self.form
        if not self.symmetric:
            return as_bytes(layer.get_weight("weight_zero_point").data.T)
        middle = torch.full(
            (form.num_groups, form.out_features),
            2 ** (form.bits - 1),
            dtype=torch.uint8,
            device=layer.get_weight("weight_packed").device,
        )
        return pack(middle, form.bits)

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Make shapes and groups true, and the weights as large as others."""
        form = self.form
        shapes = layer.get_weight("weight_shape").data
        sides = [side for size in form.part_sizes for side in (size, form.in_features)]
        shapes.copy_(torch.tensor(sides, device=shapes.device))
        if self.has_order:
            indices = layer.get_weight("weight_g_idx").data
            indices.copy_(plain_indices(form, indices.device))
        scales = layer.get_weight("weight_scale").data
        settle_scales(scales, form.bits)
        scales.copy_(scales.to(torch.float16))

    def loaded_bytes(self, layer: WeightLayer) -> int | None:
        """Return the bytes of codes, scales, zeros and orders."""
        if self.is_tied:
            return 0
        order = 4 * len(self.form.part_sizes) * self.form.in_features if self.has_order else 0
        return held_bytes(self.form) + order
