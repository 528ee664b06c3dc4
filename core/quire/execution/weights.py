"""Stream a checkpoint into a model: each tensor is copied once, straight into its place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from attrs import frozen
from torch import Tensor

from quire.errors import CheckpointError
from quire.execution.checkpoint import Checkpoint, TensorInfo, listed, not_finite
from quire.interfaces.model import Model
from quire.layers.embedding import Head
from quire.layers.weights import WeightStore

# Finiteness is checked in slices, so that its temporary memory stays small.
CHECKED_ELEMENTS = 1 << 22


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
            found.update(_places_of_layer(module))
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


def _places_of_layer(layer: WeightStore) -> Iterator[tuple[str, Place]]:
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


def load_weights(model: Model, checkpoint: Checkpoint) -> None:
    """Fill the model from the checkpoint and let every layer repack as soon as it is full.

    Raises: CheckpointError listing missing, unexpected and wrong-shaped tensors, or naming one
    that is not finite.
    """
    expected = places(model)
    ignored = _ignored_names(model, checkpoint)
    _check_names(expected, checkpoint, ignored)
    waiting = Counter(id(place.owner) for place in expected.values())
    for tensor, data in _stream(checkpoint, set(expected)):
        # Nothing here may hold a weight that its layer drops when it repacks: that would be the
        # whole model twice.
        owner = expected[tensor.name].owner
        _copy(tensor, data, expected.pop(tensor.name))
        waiting[id(owner)] -= 1
        if owner is not None and waiting[id(owner)] == 0:
            owner.finish_loading()
    finish_tied_heads(model)


def finish_tied_heads(model: Model) -> None:
    """Let heads repack that have no weight of their own, once the embedding is full."""
    for module in model.modules():
        if isinstance(module, Head) and module.is_tied:
            module.finish_loading()


def _ignored_names(model: Model, checkpoint: Checkpoint) -> set[str]:
    patterns = list(model.weight_names.ignored)
    tied = [m for m in model.modules() if isinstance(m, Head) and m.is_tied]
    # A tied head's own tensor, where a file has one, is the embedding again.
    patterns += [re.escape(head.spec.name) + r"\..*" for head in tied]
    return {
        name
        for name in checkpoint.tensors
        if any(re.fullmatch(pattern, name) for pattern in patterns)
    }


def _check_names(expected: Mapping[str, Place], checkpoint: Checkpoint, ignored: set[str]) -> None:
    given = set(checkpoint.tensors) - ignored
    problems = []
    missing = sorted(set(expected) - given)
    unexpected = sorted(given - set(expected))
    wrong = []
    for name in sorted(given & set(expected)):
        shape, wanted = checkpoint.tensors[name].shape, tuple(expected[name].view().shape)
        if shape != wanted:
            wrong.append(f"{name} {list(shape)} instead of {list(wanted)}")
    for words, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape than config.json says", wrong),
    ):
        if names:
            problems.append(f"{len(names)} {words}: {listed(names)}")
    if problems:
        raise CheckpointError(
            f"{checkpoint.folder}: the weights do not match config.json; tensors "
            f"{'; '.join(problems)}."
        )


def _stream(checkpoint: Checkpoint, wanted: set[str]) -> Iterator[tuple[TensorInfo, Tensor]]:
    """Yield the tensors in the order of the disk; each is a view of the mapped file."""
    from safetensors import safe_open

    opened = None
    reader = None
    for tensor in checkpoint.tensors.values():
        if tensor.name not in wanted:
            continue
        if tensor.file != opened:
            opened = tensor.file
            reader = safe_open(opened, framework="pt", device="cpu").__enter__()
        assert reader is not None
        yield tensor, reader.get_tensor(tensor.name)


def _copy(tensor: TensorInfo, data: Tensor, place: Place) -> None:
    target = place.view()
    if data.is_floating_point() != target.is_floating_point():
        wanted = str(target.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, expected {wanted}."
        )
    target.copy_(data)
    if not target.is_floating_point() or _is_finite(target):
        return
    if _is_finite(data):
        dtype = str(target.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} holds numbers that {dtype} cannot; "
            "use --dtype bfloat16 or float32."
        )
    raise not_finite(tensor)


def _is_finite(tensor: Tensor) -> bool:
    # One pass without temporary memory; only a sum that overflows needs the exact check.
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return True
    rows = max(1, CHECKED_ELEMENTS // max(1, tensor[0].numel())) if tensor.dim() else 1
    pieces = tensor.split(rows) if tensor.dim() else (tensor,)
    return all(bool(torch.isfinite(piece).all()) for piece in pieces)
