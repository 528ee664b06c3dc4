"""Quantization methods with one mistake each, and what the kit should say of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from int8_weights import GROUP, HiddenInt8Product, Int8, Int8Product, Packed, PackedProduct
from torch import Tensor

from quire.interfaces.quantization import (
    LayerMethod,
    LayerSpec,
    QuantizationMethod,
    ShardRule,
    WeightLayer,
)

BROKEN: dict[str, type[QuantizationMethod]] = {}
SAYS: dict[str, str] = {}


def broken(name: str, says: str) -> Any:
    """Enter a method, or the product of an int8 or packed one; `says` is part of the report."""

    def enter(found: Any) -> Any:
        if issubclass(found, LayerMethod):
            family = Packed if issubclass(found, PackedProduct) else Int8
            BROKEN[name] = type(found.__name__, (family,), {"product": found})
        else:
            BROKEN[name] = found
        SAYS[name] = says
        return found

    return enter


@broken("bias-forgotten", "the bias is not added")
class BiasForgotten(Int8Product):
    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        return super().apply(layer, x, None)


@broken("bias-twice", "the bias is added twice")
class BiasTwice(Int8Product):
    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        return super().apply(layer, x, None if bias is None else 2 * bias)


@broken("one-scale-for-all-projections", "projections that share one lose the small weights")
class OneScale(Int8Product):
    def scales_of(self, weight: Tensor) -> Tensor:
        return (weight.abs().max() / 127).expand(len(weight), 1).contiguous()


@broken("one-scale-and-nothing-read-back", "projections may share a scale")
class OneHiddenScale(HiddenInt8Product):
    batch_invariant = False

    def scales_of(self, weight: Tensor) -> Tensor:
        return (weight.abs().max() / 127).expand(len(weight), 1).contiguous()


@broken("scales-by-input", "it raises")
class ScalesByInput(HiddenInt8Product):
    def scales_of(self, weight: Tensor) -> Tensor:
        return weight.abs().amax(0, keepdim=True) / 127

    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        weight = layer.get_weight("values").float() * layer.get_weight("scales").T
        return (x.float() @ weight.T).to(self.dtype)


@broken("rounds-to-zero", "the weight: ")
class RoundsToZero(Int8Product):
    def finish_loading(self, layer: WeightLayer) -> None:
        weight = layer.get_weight("weight").data.float()
        scales = self.scales_of(weight)
        layer.drop_weight("weight")
        values = (weight / scales).trunc_().to(torch.int8)
        layer.add_weight("values", values, ShardRule(output_dim=0, input_dim=1))
        layer.add_weight("scales", scales, ShardRule(output_dim=0))


@broken("plain-weight-kept", "the weight of the checkpoint is kept")
class PlainWeightKept(Int8Product):
    def finish_loading(self, layer: WeightLayer) -> None:
        self.kept = layer.get_weight("weight").data.float()
        super().finish_loading(layer)


@broken("wide-result", "the result is torch.float32 instead of torch.bfloat16")
class WideResult(Int8Product):
    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        return super().apply(layer, x, bias).float()


@broken("transposed-result", "the result has strides")
class TransposedResult(Int8Product):
    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        return super().apply(layer, x, bias).T.contiguous().T


@broken("input-scaled-in-place", "x was changed")
class InputScaledInPlace(Int8Product):
    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        out = super().apply(layer, x, bias)
        x.mul_(2)
        return out


@broken("odd-input-dropped", "the last input of an odd number is dropped")
class OddInputDropped(Int8Product):
    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        even = x.shape[1] // 2 * 2
        return super().multiplied(x[:, :even], weight[:, :even])


@broken("many-rows-cut", "weight is not loaded")
class ManyRowsCut(Int8Product):
    """A tile of 32 rows: what is beyond is not written."""

    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        out = super().apply(layer, x, bias)
        out[32:] = float("nan")
        return out


@broken("no-rows", "it raises")
class NoRows(Int8Product):
    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([row @ weight.T for row in x.float().split(1)][: len(x) or -1])


@broken("strides-ignored", "got ")
class StridesIgnored(Int8Product):
    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        flat = x.as_strided(x.shape, (x.shape[1], 1)) if len(x) > 1 else x
        return super().apply(layer, flat, bias)


@broken("scale-over-all-rows", "a scale or a sum is taken over all rows")
class ScaleOverAllRows(Int8Product):
    """Activations are scaled by the largest of the batch."""

    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.float().abs().max().clamp(min=1e-30) if len(x) else 1.0
        return super().multiplied(x / scale, weight) * scale


@broken("batch-decides", "in its bits from the")
class BatchDecides(Int8Product):
    """Declared to be batch-invariant, and not."""

    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        if len(x) < 4:
            return super().multiplied(x, weight)
        half = x.shape[1] // 2
        first = x[:, :half].float() @ weight[:, :half].T
        return first + x[:, half:].float() @ weight[:, half:].T


@broken("one-method-for-all-layers", "kept where all layers share it")
class OneMethodForAllLayers(Int8):
    """Weights are kept in the method, of which there is one for layers of one shape."""

    class Product(HiddenInt8Product):
        def finish_loading(self, layer: WeightLayer) -> None:
            super().finish_loading(layer)
            self.kept = layer.get_weight("values"), layer.get_weight("scales")

        def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
            weight = self.kept[0].float() * self.kept[1]
            out = x.float() @ weight.T
            return (out if bias is None else out + bias.float()).to(self.dtype)

    def method_for(self, spec: LayerSpec) -> LayerMethod | None:
        made = self.__dict__.setdefault("made", {})
        found = super().method_for(spec)
        return made.setdefault(spec, self.Product(spec)) if found else None


@broken("nibbles-swapped", "got ")
class NibblesSwapped(PackedProduct):
    def unpacked(self, packed: Tensor) -> Tensor:
        return torch.stack((packed >> 4, packed & 15), -1).flatten(1)


@broken("zero-point-off-by-one", "got ")
class ZeroPointOffByOne(PackedProduct):
    def unpacked(self, packed: Tensor) -> Tensor:
        return super().unpacked(packed) + 1


@broken("gate-and-up-swapped", "apply_after_silu_mul: ")
class GateAndUpSwapped(Int8Product):
    def apply_after_silu_mul(
        self, layer: WeightLayer, gate_up: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        up, gate = gate_up.chunk(2, dim=1)
        return self.apply(layer, torch.nn.functional.silu(gate) * up, bias)


@broken("excluded-layer-quantized", "is excluded by the configuration, and is quantized")
class ExcludedLayerQuantized(Int8):
    def method_for(self, spec: LayerSpec) -> LayerMethod | None:
        return Int8Product(spec) if "proj" in spec.name else None


@broken("sums-in-half-precision", "got ")
class SumsInHalfPrecision(Int8Product):
    """The accumulator has the dtype of the result."""

    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros(len(x), len(weight))
        for i in range(0, x.shape[1], 4):
            part = x[:, i : i + 4].float() @ weight[:, i : i + 4].T
            total = (total + part).to(self.dtype).float()
        return total


@broken("overflows-in-half-precision", "an input far larger than the others")
class OverflowsInHalfPrecision(Int8Product):
    """Products in float16, whatever the model's dtype is."""

    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.dtype is torch.bfloat16:
            x = x.half()
        return super().multiplied(x, weight)


@broken("row-of-zeros-divided", "a row of zeros")
class RowOfZerosDivided(Int8Product):
    """Each row is scaled by its largest number."""

    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.float().abs().amax(1, keepdim=True)
        return super().multiplied(x.float() / scale, weight) * scale


@broken("output-of-zeros-divided", "an output whose weights are zeros")
class OutputOfZerosDivided(Int8Product):
    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        largest = weight.abs().amax(1)
        return super().multiplied(x, weight / largest[:, None]) * largest


@broken("scale-of-the-first-call", "the second call")
class ScaleOfTheFirstCall(Int8Product):
    """Activations are clipped to what was seen first."""

    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        if not len(x):
            return super().multiplied(x, weight)
        self.most = getattr(self, "most", x.float().abs().max())
        return super().multiplied(x.float().clamp(-self.most, self.most), weight)


@broken("scales-of-groups-in-turn", "got ")
class ScalesOfGroupsInTurn(PackedProduct):
    """Each input in turn has the next scale, where neighbours share one."""

    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        values = self.unpacked(layer.get_weight("weight_packed")).float() - 8
        scales = layer.get_weight("weight_scale").repeat(1, GROUP)
        out = torch.nn.functional.linear(x.float(), values * scales)
        return (out if bias is None else out + bias.float()).to(x.dtype)


@broken("read-back-without-its-scale", "got ")
class ReadBackWithoutItsScale(Int8Product):
    """The product is right; what is read back is not."""

    def dequantize(self, layer: WeightLayer) -> Tensor | None:
        return layer.get_weight("values").float()

    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        out = self.multiplied(x, layer.get_weight("values").float() * layer.get_weight("scales"))
        return (out if bias is None else out + bias.float()).to(self.dtype)


class BiasForgottenMethod(Int8):
    """The method of the first of them, by a name that can be loaded."""

    product = BiasForgotten


@broken("results-share-memory", "results share memory")
class ResultsShareMemory(Int8Product):
    shared: ClassVar[dict[Any, Tensor]] = {}

    def apply(self, layer: WeightLayer, x: Any, bias: Tensor | None) -> Tensor:
        out = super().apply(layer, x, bias)
        return self.shared.setdefault(out.shape, torch.empty_like(out)).copy_(out)


@broken("inputs-beyond-512", "got ")
class InputsBeyond512(Int8Product):
    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().multiplied(x[:, :512], weight[:, :512])
