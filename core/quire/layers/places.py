"""Where each tensor of a checkpoint goes: a parameter of the model, or a slice of one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from attrs import evolve, frozen
from torch import Tensor, nn

from quire.errors import PluginError
from quire.interfaces.model import Model, WeightNames
from quire.layers.experts import Experts
from quire.layers.weights import WeightStore


@frozen(kw_only=True)
class Place:
    """Where a checkpoint's tensor goes: the parameter `name` of a module, or a slice of it.

    `expert` is the entry along the first dimension of a parameter that holds all experts;
    `dimension` counts those of the entry. `is_transposed`: files hold [inputs, outputs].
    """

    module: nn.Module
    name: str
    dimension: int = 0
    offset: int = 0
    size: int | None = None
    expert: int | None = None
    is_transposed: bool = False

    @property
    def owner(self) -> WeightStore | None:
        """The layer, if it is one that repacks its weights."""
        return self.module if isinstance(self.module, WeightStore) else None

    def view(self) -> Tensor:
        """Return the memory to fill; on `meta` until the layer is given its memory."""
        parameter = self.module.get_parameter(self.name).data
        if self.expert is not None:
            parameter = parameter[self.expert]
        if self.size is not None:
            parameter = parameter.narrow(self.dimension, self.offset, self.size)
        return parameter.t() if self.is_transposed else parameter


def places(model: Model) -> dict[str, Place]:
    """Return the place of every tensor that the model needs, by its name in the checkpoint."""
    found: dict[str, Place] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, WeightStore):
            found.update(places_of_layer(module))
            continue
        for name, _ in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            full = _renamed(full, model.weight_names.renamed)
            found[full] = Place(module=module, name=name)
    for pattern in model.weight_names.transposed:
        for name in filter(re.compile(pattern).fullmatch, list(found)):
            found[name] = evolve(found[name], is_transposed=True)
    return found


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    for pattern, replacement in renamed.items():
        name = re.sub(pattern, replacement, name)
    return name


def places_of_layer(layer: WeightStore) -> Iterator[tuple[str, Place]]:
    """Yield the name and the place of every tensor of a layer, those of fused parts apart."""
    if isinstance(layer, Experts):
        yield from _places_of_experts(layer)
        return
    parts = getattr(layer.spec, "parts", ())
    prefix = layer.spec.name.rpartition(".")[0]
    for name, rule in layer.rules.items():
        if len(parts) < 2 or rule.output_dim is None:
            yield f"{layer.spec.name}.{name}", Place(module=layer, name=name)
            continue
        packed = rule.pack_factor if rule.packed_dim == rule.output_dim else 1
        offset = 0
        for part, size in zip(parts, rule.part_sizes or layer.part_sizes, strict=True):
            part_name = f"{prefix}.{part}.{name}" if prefix else f"{part}.{name}"
            yield (
                part_name,
                Place(
                    module=layer,
                    name=name,
                    dimension=rule.output_dim,
                    offset=offset // packed,
                    size=size // packed,
                ),
            )
            offset += size


def _places_of_experts(layer: Experts) -> Iterator[tuple[str, Place]]:
    """Yield the name and the place of every projection of every expert."""
    spec = layer.spec
    gate, up, down = spec.parts
    for name, rule in layer.rules.items():
        kind = next((k for k in ("gate_up", "down") if name.startswith(f"{k}_")), None)
        if kind is None or not rule.output_dim:
            raise PluginError(
                f"weight {name!r} of {spec.name!r}: those of experts are called gate_up_.. or "
                f"down_.. and have an output_dim above 0, the experts' dimension."
            )
        leaf = name.removeprefix(f"{kind}_")
        sizes = rule.part_sizes or (spec.intermediate_size,) * 2
        slices: list[tuple[str, int, int | None]]
        slices = [(gate, 0, sizes[0]), (up, sizes[0], sizes[1])]
        if kind == "down":
            slices = [(down, 0, None)]
        for expert in range(spec.num_experts):
            for part, offset, size in slices:
                yield (
                    f"{spec.name}.{expert}.{part}.{leaf}",
                    Place(
                        module=layer,
                        name=name,
                        dimension=rule.output_dim - 1,
                        offset=offset,
                        size=size,
                        expert=expert,
                    ),
                )


def own_names(given: Iterable[str], expected: set[str], rules: WeightNames) -> dict[str, str]:
    """Return the model's own name for each of a file's.

    A file of the bare body of a model has no base, one of a model around it has.
    """
    base = rules.base
    names = {name: _renamed(name, rules.aliases) for name in given}
    is_wanted = any(name.startswith(base) for name in expected)
    if not base or is_wanted == any(name.startswith(base) for name in names.values()):
        return names
    taken = set(names.values())
    for name, own in names.items():
        other = base + own if is_wanted else own.removeprefix(base)
        if other not in taken and (other in expected or not is_wanted):
            names[name] = other
    return names
