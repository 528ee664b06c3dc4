"""Read what a quantizer wrote as its plugin will, and say how far it is from what was given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from attrs import evolve
from torch import Tensor

from quire.errors import PluginError
from quire.interfaces.quantization import (
    InputMoments,
    LayerMethod,
    LinearSpec,
    QuantizationMethod,
)
from quire.layers.linear import Linear
from quire.layers.places import places_of_layer

ROWS = 1024  # of a weight that are compared at once


def read_back(
    method: QuantizationMethod, spec: LinearSpec, tensors: Mapping[str, Tensor]
) -> Tensor:
    """Return the weight float32 [out_features, in_features] that a layer's tensors stand for.

    Raises: PluginError where the method that writes them does not read them.
    """
    name = type(method).__name__
    layer_method = method.method_for(spec)
    if layer_method is None:
        raise PluginError(f"{name} leaves {spec.name!r} alone, which its quantizer writes.")
    assert isinstance(layer_method, LayerMethod), layer_method
    layer = Linear(evolve(spec, bias=False), layer_method)
    layer.allocate()
    for tensor_name, place in places_of_layer(layer):
        view, given = place.view(), tensors.get(tensor_name)
        if given is None or given.shape != view.shape:
            shape = "nothing" if given is None else list(given.shape)
            raise PluginError(
                f"{name} reads {tensor_name!r} as {list(view.shape)}; its quantizer wrote {shape}."
            )
        view.copy_(given)
    layer.finish_loading()
    weight = layer_method.dequantize(layer)
    if weight is None:
        raise PluginError(f"{name} does not offer LayerMethod.dequantize, which is needed here.")
    return weight


def relative_error(
    weights: Sequence[Tensor], rounded: Tensor, moments: InputMoments | None
) -> float:
    """Return how much of a layer's outputs is wrong, of the weights where no inputs are known."""
    wrong, whole, first = 0.0, 0.0, 0
    for weight in weights:
        for piece in weight.split(ROWS):
            wrong += _size(rounded[first : first + len(piece)] - piece, moments)
            whole += _size(piece, moments)
            first += len(piece)
    return math.sqrt(wrong / whole) if whole > 0 else 0.0


def _size(weight: Tensor, moments: InputMoments | None) -> float:
    seen = weight if moments is None else weight @ moments.second
    return max(0.0, float((seen * weight).sum(dtype=torch.float64)))
