"""A weight that is read in a checkpoint's format and kept in the model's dtype."""

from __future__ import annotations

from typing import Any

import torch

from quire.errors import PluginError
from quire.interfaces.quantization import LayerMethod, LinearSpec, ShardRule, WeightMethod
from quire.layers.weights import WeightStore


class WidenedMethod(WeightMethod):
    """Let `method` read the weight, and keep what it stands for as `weight`."""

    def __init__(self, spec: LinearSpec, method: LayerMethod) -> None:
        self.spec, self.method = spec, method
        self.dtype = getattr(torch, spec.dtype)

    def create_weights(self, layer: Any) -> None:
        """Register the format's weights."""
        self.method.create_weights(layer)

    def settle_drawn(self, layer: Any) -> None:
        """Make of drawn weights what could be loaded."""
        self.method.settle_drawn(layer)

    def loaded_bytes(self, layer: Any) -> int:
        """Return the bytes of the wide weight."""
        return self.spec.out_features * self.spec.in_features * self.dtype.itemsize

    def finish_loading(self, layer: Any) -> None:
        """Exchange the format's weights for the wide one.

        Raises: PluginError where the method does not tell its weight.
        """
        self.method.finish_loading(layer)
        wide = self.method.dequantize(layer)
        if wide is None:
            raise PluginError(
                f"{type(self.method).__name__} does not say what weight it keeps for "
                f"{self.spec.name!r}, which is needed in parts: `dequantize` returns None."
            )
        for name in list(layer.rules):
            layer.drop_weight(name)
        layer.add_weight("weight", wide.to(self.dtype), ShardRule(output_dim=0, input_dim=1))


class WidenedWeight(WeightStore):
    """`weight` [out_features, in_features] of a projection that is multiplied in parts."""

    def __init__(self, spec: LinearSpec, method: LayerMethod) -> None:
        super().__init__(spec, WidenedMethod(spec, method))
        self.method.create_weights(self)

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Sizes of the projections along the outputs."""
        spec: LinearSpec = self.spec
        return spec.output_sizes
