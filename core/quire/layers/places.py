"""Where each tensor of a checkpoint goes: a parameter of the model, or a slice of one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from attrs import frozen
from torch import Tensor

from quire.interfaces.model import Model
from quire.layers.weights import WeightStore


@frozen(kw_only=True)
class Place:
    """Where a checkpoint's tensor goes: a slice of a parameter, and the layer it belongs to."""

    parameter: Tensor
    owner: WeightStore | None
    dimension: int = 0
    offset: int = 0
    size: int | None = None

    def view(self) -> Tensor:
        """Return the memory to fill."""
        if self.size is None:
            return self.parameter.data
        return self.parameter.data.narrow(self.dimension, self.offset, self.size)


def places(model: Model) -> dict[str, Place]:
    """Return the place of every tensor that the model needs, by its name in the checkpoint."""
    found: dict[str, Place] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, WeightStore):
            found.update(places_of_layer(module))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            full = _renamed(full, model.weight_names.renamed)
            found[full] = Place(parameter=parameter, owner=None)
    return found


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    for pattern, replacement in renamed.items():
        name = re.sub(pattern, replacement, name)
    return name


def places_of_layer(layer: WeightStore) -> Iterator[tuple[str, Place]]:
    """Yield the name and the place of every tensor of a layer, those of fused parts apart."""
    parts = getattr(layer.spec, "parts", ())
    prefix = layer.spec.name.rpartition(".")[0]
    for name, rule in layer.rules.items():
        parameter = layer.get_weight(name)
        if len(parts) < 2 or rule.output_dim is None:
            yield f"{layer.spec.name}.{name}", Place(parameter=parameter, owner=layer)
            continue
        packed = rule.pack_factor if rule.packed_dim == rule.output_dim else 1
        offset = 0
        for part, size in zip(parts, layer.part_sizes, strict=True):
            part_name = f"{prefix}.{part}.{name}" if prefix else f"{part}.{name}"
            yield (
                part_name,
                Place(
                    parameter=parameter,
                    owner=layer,
                    dimension=rule.output_dim,
                    offset=offset // packed,
                    size=size // packed,
                ),
            )
            offset += size
