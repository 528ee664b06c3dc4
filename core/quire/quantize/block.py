"""One block: take down its inputs, move factors, quantize its linears, and run it as written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.quantization import (
    InputMoments,
    QuantizationMethod,
    WeightQuantizer,
)
from quire.layers.linear import Linear
from quire.layers.places import Place
from quire.quantize.batches import Attending
from quire.quantize.blocks import Call
from quire.quantize.folding import Fold, find_folds, linears_of
from quire.quantize.rounding_error import read_back, relative_error
from quire.quantize.streaming import InputSums, StreamedProduct, Tensors, part_names


class BlockWork:
    """A block whose weights are in memory, and what is found out about it.

    `errors`: the relative error of each linear, by its name in the checkpoint.
    """

    def __init__(
        self,
        block: nn.Module,
        places: Mapping[str, Place],
        quantizer: WeightQuantizer,
        reader: QuantizationMethod,
        attending: Attending | None,
    ) -> None:
        self.block = block
        self.linears = linears_of(block)
        self.errors: dict[str, float] = {}
        self._places = places
        self._quantizer, self._reader, self._attending = quantizer, reader, attending
        # Factors of inputs and outputs that are to go into a weight before it is rounded.
        self._columns: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._changed: set[int] = set()

    def run(self, calls: list[Call], batches: list[Batch]) -> list[Any]:
        """Return the block's outputs."""
        assert self._attending is not None
        outputs = []
        for call, batch in zip(calls, batches, strict=True):
            self._attending.plan(batch)
            outputs.append(call.run(self.block))
        return outputs

    def quantize(
        self, calls: list[Call], batches: list[Batch], tensors: Tensors
    ) -> dict[str, Tensor]:
        """Return the tensors of the block as they are to be written."""
        moments = self._moments(calls, batches) if self._quantizer.needs_inputs else {}
        if moments:
            self._smooth(moments, lambda: self.run(calls[:1], batches[:1])[0])
        written: dict[str, Tensor] = {}
        replaced: set[int] = set()
        for name, linear in self.linears.items():
            written |= self._quantize_linear(name, linear, moments.pop(name, None))
            replaced.add(id(linear))
        for name, place in self._places.items():
            if id(place.module) in replaced and place.name == "weight":
                continue
            is_changed = id(place.module.get_parameter(place.name)) in self._changed
            found = place.view().clone() if is_changed else tensors.get(name)
            written[name] = found
        return {name: tensor.cpu().contiguous() for name, tensor in written.items()}

    def _moments(self, calls: list[Call], batches: list[Batch]) -> dict[str, InputMoments]:
        sums = {}
        for name, linear in self.linears.items():
            device = linear.get_weight("weight").device
            sums[name] = InputSums.empty(linear.spec.in_features, device)
            _product(linear).sums = sums[name]
        self.run(calls, batches)
        for linear in self.linears.values():
            _product(linear).sums = None
        return {name: one.moments() for name, one in sums.items()}

    def _smooth(self, moments: dict[str, InputMoments], run: Any) -> None:
        if type(self._quantizer).smooth is WeightQuantizer.smooth:
            return
        for fold in find_folds(self.block, run):
            weights = [part for name in fold.consumers for part in self._weights(name)]
            factors = self._quantizer.smooth(weights, moments[fold.consumers[0]])
            if factors is not None:
                self._fold(fold, factors, moments)

    def _fold(self, fold: Fold, factors: Tensor, moments: dict[str, InputMoments]) -> None:
        """Divide what makes the inputs by the factors, and what takes them multiply."""
        if fold.rows is None:
            parameter = self.block.get_parameter(fold.producer)
            divided = (parameter.float() / factors).to(parameter.dtype)
            # What was rounded here is what the weights are multiplied by.
            exact = parameter.float() / divided.float()
            factors = torch.where((divided != 0) & exact.isfinite(), exact, factors)
            parameter.copy_(divided)
            self._changed.add(id(parameter))
        else:
            linear = self.linears[fold.producer]
            ones = torch.ones(linear.spec.out_features, device=factors.device)
            self._rows.setdefault(fold.producer, ones)[fold.rows] /= factors
        for name in fold.consumers:
            self._columns[name] = self._columns.get(name, 1.0) * factors
            own = moments[name]
            own.second.div_(factors).div_(factors[:, None])
            own.magnitude.div_(factors)

    def _weights(self, name: str) -> list[Tensor]:
        """Return the projections of a linear with their factors, float32."""
        linear = self.linears[name]
        weight = linear.get_weight("weight").float()
        if name in self._columns:
            weight = weight * self._columns[name]
        if name in self._rows:
            weight = weight * self._rows[name][:, None]
        return list(weight.split(linear.spec.output_sizes))

    def _quantize_linear(
        self, name: str, linear: Linear, moments: InputMoments | None
    ) -> dict[str, Tensor]:
        made = self._quantizer.quantize(self._weights(name), moments)
        written = {
            f"{part}.{key}": tensor
            for part, own in zip(part_names(linear.spec), made, strict=True)
            for key, tensor in own.items()
        }
        rounded = read_back(self._reader, linear.spec, written)
        self.errors[linear.spec.name] = relative_error(self._weights(name), rounded, moments)
        return written

    def take_back(self, written: Mapping[str, Tensor]) -> None:
        """Make the block what its written tensors stand for."""
        for linear in self.linears.values():
            rounded = read_back(self._reader, linear.spec, written)
            linear.get_weight("weight").data.copy_(rounded)
        for name, place in self._places.items():
            if not (isinstance(place.module, Linear) and place.name == "weight"):
                place.view().copy_(written[name])
        if self._attending is not None:
            self._attending.bind(self.block)


def _product(linear: Linear) -> StreamedProduct:
    assert isinstance(linear.method, StreamedProduct)
    return linear.method
