"""Weights of 2, 3, 4 or 8 bits in groups: how they lie once loaded, and the product with them.

`gptq`, `awq` and `int4` read different things and keep the same:

    values       uint8 [out_features, in_features * bits / 8], a row of codes along the inputs
    scales       float16 [num_groups, out_features]
    zeros        uint8 [num_groups, out_features * bits / 8], codes along the outputs
    input_order  int32 [orders, in_features], only where the inputs of a group do not lie together

Codes are a string of bits, the first code in the lowest bits of the first byte: with 4 bits two
codes a byte, with 3 bits eight codes in three bytes. A weight is (code - zero) * scale.

On a GPU values of 4 and 8 bits lie as `tiles` instead, where `quire_kernels.packed` has products
with them: `quire_quant.tiled`. On a CPU `quire_quant.on_cpu` multiplies with them as they are, once
`quire_kernels.cpu` is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as functional
from attrs import frozen
from torch import Tensor

from quire.errors import CheckpointError
from quire.interfaces.quantization import (
    EmbeddingSpec,
    LayerMethod,
    LinearSpec,
    QuantizedActivation,
    ShardRule,
    WeightLayer,
)
from quire_kernels import ops
from quire_kernels.packed import layout, product
from quire_quant import on_cpu, tiled
from quire_quant.module_names import part_names

# Weights that are wide at one time in a product: 16 MiB in float32.
SLICE_WEIGHTS = 1 << 22
# While a layer is repacked, beside a model that is all there but for it; and pieces of a small one.
PIECE_WEIGHTS, PIECES = 1 << 19, 16
# Slices of outputs begin at whole words of every format.
SLICE_STEP = 32


def codes_in_unit(bits: int) -> int:
    """Return the fewest codes that fill whole bytes."""
    return 8 // math.gcd(bits, 8)


def num_bytes(count: int, bits: int) -> int:
    """Return the bytes of `count` codes, the last unit padded."""
    unit = codes_in_unit(bits)
    return -(-count // unit) * unit * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes uint8 [..., n] as a string of bits, uint8 [..., num_bytes(n, bits)]."""
    if bits == 8:
        return codes.contiguous()
    unit = codes_in_unit(bits)
    padded = functional.pad(codes, (0, -codes.shape[-1] % unit))
    words = padded.unflatten(-1, (-1, unit)).to(torch.int32)
    words = (words << _shifts(unit * bits, bits, codes)).sum(-1, keepdim=True, dtype=torch.int32)
    return ((words >> _shifts(unit * bits, 8, codes)) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes, uint8 [..., count], of what `pack` returns."""
    if bits == 8:
        return packed[..., :count]
    unit, words = codes_in_unit(bits), packed
    if unit * bits > 8:
        words = packed.unflatten(-1, (-1, unit * bits // 8)).to(torch.int32)
        words = (words << _shifts(unit * bits, 8, packed)).sum(-1, dtype=torch.int32)
    # Each code of a unit by itself: one shift over all of them took twice as long.
    codes = [((words >> bits * i) & (2**bits - 1)).to(torch.uint8) for i in range(unit)]
    return torch.stack(codes, -1).flatten(-2)[..., :count]


def as_bytes(words: Tensor) -> Tensor:
    """Return a copy of int32 [rows, n], of any strides, as uint8 [rows, 4 n]."""
    # `contiguous` keeps the strides of a dimension of one element, which `view` then refuses.
    copy = words.new_empty(words.shape)
    return copy.copy_(words).view(torch.uint8)


def _shifts(width: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, width, step, dtype=torch.int32, device=like.device)


@frozen(kw_only=True)
class PackedForm:
    """Sizes of a layer; `part_sizes` are the outputs of its projections."""

    bits: int
    group_size: int
    in_features: int
    part_sizes: tuple[int, ...]
    dtype: str
    device: str

    @classmethod
    def of(cls, spec: LinearSpec | EmbeddingSpec, bits: int, group_size: int | None) -> PackedForm:
        """Return the form of a layer; without a size all inputs are one group."""
        if isinstance(spec, LinearSpec):
            in_features, part_sizes = spec.in_features, spec.output_sizes
        else:
            in_features, part_sizes = spec.embedding_dim, (spec.num_embeddings,)
        return cls(
            bits=bits,
            group_size=group_size or in_features,
            in_features=in_features,
            part_sizes=part_sizes,
            dtype=spec.dtype,
            device=spec.device,
        )

    @property
    def out_features(self) -> int:
        """Outputs of all projections together."""
        return sum(self.part_sizes)

    @property
    def num_groups(self) -> int:
        """Groups that share a scale, of each output."""
        return self.in_features // self.group_size

    def slices(self, first: int, end: int) -> Iterator[slice]:
        """Yield parts of the outputs whose weights may be wide at one time in a product."""
        return self._cut(first, end, SLICE_WEIGHTS)

    def pieces(self, first: int = 0, end: int | None = None) -> Iterator[slice]:
        """Yield parts of the outputs whose weights may be wide at one time while they load."""
        most = min(PIECE_WEIGHTS, self.out_features * self.in_features // PIECES)
        return self._cut(first, self.out_features if end is None else end, most)

    def _cut(self, first: int, end: int, most: int) -> Iterator[slice]:
        step = max(1, most // self.in_features // SLICE_STEP) * SLICE_STEP
        for start in range(first, end, step):
            yield slice(start, min(start + step, end))


def spans_of(form: PackedForm, orders: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield outputs that see the inputs in one order, and the order; None: as they are.

    `orders` [1 or parts, in_features].
    """
    if orders is None or len(orders) < 2:
        yield slice(0, form.out_features), None if orders is None else orders[0]
        return
    first = 0
    for size, order in zip(form.part_sizes, orders, strict=True):
        yield slice(first, first + size), order
        first += size


def held_bytes(form: PackedForm) -> int:
    """Return the bytes of values, scales and zeros once a layer is loaded, on its device."""
    codes = num_bytes(form.in_features, form.bits) * form.out_features
    zeros = form.num_groups * num_bytes(form.out_features, form.bits)
    # Codes of 8 bits have a second scale in tiles.
    is_doubled = form.bits == 8 and tiled.lies_in_tiles(form, torch.ones(1))
    return codes + zeros + 2 * form.num_groups * form.out_features * (2 if is_doubled else 1)


def _column(of_groups: Tensor) -> Tensor:
    """Return float32 [out, num_groups, 1] of [num_groups, out]."""
    return of_groups.T.float().contiguous().unsqueeze(-1)


class PackedProduct(LayerMethod):
    """x W^T + b, a slice of W's outputs at a time made wide."""

    def __init__(self, form: PackedForm) -> None:
        self.form = form
        self.num_orders = 0
        self.may_tile = True
        self.is_tiled = self.has_short_scales = False

    def install(
        self,
        layer: WeightLayer,
        *,
        values: Tensor,
        scales: Tensor,
        zeros: Tensor,
        order: Tensor | None = None,
    ) -> None:
        """Register what is kept, as the module says; the format's own weights are dropped before.

        Columns of `values` are in their last order by then: they may be kept as a copy.
        `order` [1 or parts, in_features]: which input each column of `values` multiplies, of all
        projections or of each.
        """
        if order is not None:
            self.num_orders = len(order)
            layer.add_weight("input_order", order, ShardRule())
        form = self.form
        self.is_tiled = self.may_tile and tiled.lies_in_tiles(form, scales)
        if self.is_tiled:
            self.has_short_scales = layout.are_short(scales)
            for name, tensor in tiled.to_tiles(form, values, scales, zeros).items():
                layer.add_weight(name, tensor, ShardRule())
            return
        packed = 8 // form.bits if 8 % form.bits == 0 else 1
        rule = ShardRule(output_dim=0, input_dim=1, packed_dim=1, pack_factor=packed)
        layer.add_weight("values", values, rule)
        scales, zeros = on_cpu.by_output(form, scales), on_cpu.by_output(form, zeros)
        rule = ShardRule(output_dim=1, input_dim=0, group_size=form.group_size)
        layer.add_weight("scales", scales, rule)
        rule = ShardRule(
            output_dim=1,
            input_dim=0,
            packed_dim=1,
            pack_factor=packed,
            group_size=form.group_size,
        )
        layer.add_weight("zeros", zeros, rule)

    def _tiled(self, layer: WeightLayer) -> layout.TiledWeight:
        return layout.TiledWeight(
            tiles=layer.get_weight("tiles"),
            scales=layer.get_weight("scales"),
            zeros=layer.get_weight("zeros"),
            group_size=self.form.group_size,
            has_short_scales=self.has_short_scales,
        )

    def _weight_on_cpu(self, layer: WeightLayer) -> on_cpu.PackedWeight:
        return on_cpu.PackedWeight(
            values=layer.get_weight("values"),
            scales=layer.get_weight("scales"),
            zeros=layer.get_weight("zeros"),
            bits=self.form.bits,
            group_size=self.form.group_size,
        )

    def _wide(self, layer: WeightLayer, outputs: slice) -> Tensor:
        """Return some rows of the weight, float32, its columns as they are kept."""
        form, first, end = self.form, outputs.start, outputs.stop
        if self.is_tiled:
            return tiled.widened(form, self._tiled(layer).outputs(first, end))
        codes = unpack(layer.get_weight("values")[outputs], form.bits, form.in_features)
        packed = slice(first * form.bits // 8, num_bytes(end, form.bits))
        zeros = unpack(layer.get_weight("zeros")[:, packed], form.bits, end - first)
        scales = layer.get_weight("scales")[:, outputs]
        weight = codes.float().unflatten(1, (form.num_groups, -1))
        weight.sub_(_column(zeros)).mul_(_column(scales))
        return weight.flatten(1)

    def _spans(self, layer: WeightLayer) -> Iterator[tuple[slice, Tensor | None]]:
        orders = layer.get_weight("input_order") if self.num_orders else None
        return spans_of(self.form, orders)

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Return the product; memory beside the output's is that of one slice."""
        assert isinstance(x, Tensor)
        out = x.new_empty(x.shape[0], self.form.out_features)
        is_on_cpu = not self.is_tiled and on_cpu.multiplies(self.form, x.dtype)
        for span, order in self._spans(layer):
            if is_on_cpu:
                part = None if bias is None else bias[span]
                packed = self._weight_on_cpu(layer).outputs(span)
                on_cpu.write_linear(x, packed, part, out[:, span], order)
                continue
            ordered = x if order is None else x[:, order]
            if self.is_tiled:
                part = None if bias is None else bias[span]
                weight = self._tiled(layer).outputs(span.start, span.stop)
                own = tiled.input_of(self.form, ordered)
                product.write_linear(own, weight, part, out[:, span])
                continue
            for outputs in self.form.slices(span.start, span.stop):
                wide = self._wide(layer, outputs).to(x.dtype)
                part = None if bias is None else bias[outputs]
                out[:, outputs] = ops.linear(ordered, wide, part)
        return out

    def _whole(self, layer: WeightLayer) -> layout.TiledWeight | None:
        """Return the tiles of all outputs, None where they are none or the inputs have an order."""
        is_one = self.is_tiled and self.form.bits == 4 and not self.num_orders
        return self._tiled(layer) if is_one else None

    def apply_after_norm(
        self,
        layer: WeightLayer,
        addends: tuple[Tensor, Tensor],
        norm: tuple[Tensor, float],
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Offer it for few tokens on a GPU, unless the inputs have an order."""
        weight = self._whole(layer)
        if weight is None or not product.fuses_norm(addends[0], weight):
            return None
        return product.add_rms_norm_linear(addends, norm, weight, bias)

    def apply_gated_after_norm(
        self, layer: WeightLayer, addends: tuple[Tensor, Tensor], norm: tuple[Tensor, float]
    ) -> tuple[Tensor, Tensor] | None:
        """Offer it for the same, and SiLU behind the product for more."""
        weight = self._whole(layer)
        if weight is None:
            return None
        if product.fuses_norm(addends[0], weight, gated=True):
            return product.add_rms_norm_linear(addends, norm, weight, None, gated=True)
        if not product.fuses_silu_mul(addends[0], weight):
            return None
        normed, total = ops.add_rms_norm(*addends, *norm)
        return product.linear_silu_mul(normed, weight), total

    def dequantize(self, layer: WeightLayer) -> Tensor | None:
        """Return the whole weight, float32, its columns in the order of the inputs."""
        found = torch.empty(
            self.form.out_features, self.form.in_features, device=layer.get_weight("scales").device
        )
        for span, order in self._spans(layer):
            weight = self._wide(layer, span)
            found[span] = weight if order is None else weight[:, order.long().argsort()]
        return found


class TiedPackedProduct(PackedProduct):
    """A head may be tied to the embedding: it has no weights then, and multiplies with that's.

    `create_weights`, which a tied head is not asked for, sets `is_tied` to False.
    """

    def __init__(self, form: PackedForm) -> None:
        super().__init__(form)
        self.is_tied = True

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Return the product."""
        if not self.is_tied:
            return super().apply(layer, x, bias)
        assert isinstance(x, Tensor)
        return ops.linear(x, layer.get_weight("weight"), bias)

    def dequantize(self, layer: WeightLayer) -> Tensor | None:
        """Return the whole weight; a tied head's is not quantized."""
        if self.is_tied:
            return layer.get_weight("weight").float()
        return super().dequantize(layer)


def tensor_name(spec: LinearSpec | EmbeddingSpec, part: int, name: str) -> str:
    """Return the checkpoint's name of a projection's tensor."""
    return f"{part_names(spec)[part]}.{name}"


def check_scales(layer: WeightLayer, scales: Tensor, form: PackedForm, name: str) -> None:
    """Look for scales [num_groups, out_features] that are not finite.

    Raises: CheckpointError naming the tensor, called `name` in the checkpoint.
    """
    bad = ~torch.isfinite(scales)
    if not bool(bad.any()):
        return
    group, output = bad.nonzero()[0].tolist()
    part = 0
    while output >= form.part_sizes[part]:
        output -= form.part_sizes[part]
        part += 1
    raise CheckpointError(
        f"tensor {tensor_name(layer.spec, part, name)!r} gives a scale that is NaN or infinite, "
        f"at group {group} of output {output}; the file is damaged, download it again."
    )


def settle_scales(scales: Tensor, bits: int) -> None:
    """Make of drawn scales some that give weights about as large as other layers draw."""
    scales.abs_().div_(2 ** (bits - 1))
