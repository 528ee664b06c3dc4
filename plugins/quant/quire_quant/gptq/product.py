"""A layer of a GPTQ checkpoint: what it reads, and how that is repacked."""

from __future__ import annotations

import torch

from quire.interfaces.quantization import ShardRule, WeightLayer
from quire_quant.input_order import input_order, plain_indices, reorder
from quire_quant.packed import (
    PackedForm,
    TiedPackedProduct,
    as_bytes,
    check_scales,
    pack,
    settle_scales,
    spans_of,
    unpack,
)


class GptqProduct(TiedPackedProduct):
    """Codes of an output lie along the inputs in int32.

    `g_idx` names each input's group; with `has_indices` False there is none, and they lie in order.
    """

    def __init__(self, form: PackedForm, zero_offset: int, *, has_indices: bool = True) -> None:
        super().__init__(form)
        self.zero_offset = zero_offset
        self.has_indices = has_indices

    def create_weights(self, layer: WeightLayer) -> None:
        """Register the checkpoint's tensors, without memory until they are filled."""
        form, bits = self.form, self.form.bits
        self.is_tied = False
        groups, outputs, inputs = form.num_groups, form.out_features, form.in_features
        per_word = 32 // bits if 32 % bits == 0 else 1
        shape = (inputs * bits // 32, outputs)
        rule = ShardRule(output_dim=1, input_dim=0, packed_dim=0, pack_factor=per_word)
        layer.add_weight("qweight", torch.empty(shape, dtype=torch.int32, device="meta"), rule)
        shape = (groups, outputs * bits // 32)
        rule = ShardRule(
            output_dim=1,
            input_dim=0,
            packed_dim=1,
            pack_factor=per_word,
            group_size=form.group_size,
            # In words: with 3 bits no whole number of values shares one.
            part_sizes=tuple(size * bits // 32 * per_word for size in form.part_sizes),
        )
        layer.add_weight("qzeros", torch.empty(shape, dtype=torch.int32, device="meta"), rule)
        shape = (groups, outputs)
        rule = ShardRule(output_dim=1, input_dim=0, group_size=form.group_size)
        layer.add_weight("scales", torch.empty(shape, dtype=torch.float16, device="meta"), rule)
        if not self.has_indices:
            return
        # Each projection has one of its own, end to end here.
        parts = len(form.part_sizes)
        indices = torch.empty(parts * inputs, dtype=torch.int32, device="meta")
        rule = ShardRule(output_dim=0, part_sizes=(inputs,) * parts)
        layer.add_weight("g_idx", indices, rule)

    def finish_loading(self, layer: WeightLayer) -> None:
        """Repack.

        Raises: CheckpointError naming a tensor with scales that are not finite, or groups out of
        range or of another size than the config's.
        """
        if self.is_tied:
            return
        form = self.form
        check_scales(layer, layer.get_weight("scales"), form, "scales")
        order = None
        if self.has_indices:
            order = input_order(layer.get_weight("g_idx").data, form, layer.spec, "g_idx")
            layer.drop_weight("g_idx")
        values = as_bytes(layer.get_weight("qweight").data.T)
        layer.drop_weight("qweight")
        zeros = layer.get_weight("qzeros").data.view(torch.uint8)
        if self.zero_offset:
            codes = unpack(zeros, form.bits, form.out_features)
            zeros = pack((codes + self.zero_offset) & (2**form.bits - 1), form.bits)
        scales = layer.get_weight("scales").data
        for name in ("qzeros", "scales"):
            layer.drop_weight(name)
        for span, own in spans_of(form, order):
            if own is not None:
                reorder(values, span, own, form)
        self.install(layer, values=values, scales=scales, zeros=zeros, order=order)

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Put inputs into groups in their order; make the weights as large as others."""
        form = self.form
        if self.has_indices:
            indices = layer.get_weight("g_idx").data
            indices.copy_(plain_indices(form, indices.device))
        settle_scales(layer.get_weight("scales").data, form.bits)
