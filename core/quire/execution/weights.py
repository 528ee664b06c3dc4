"""Stream a checkpoint into a model: each tensor goes once, straight into its place."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from attrs import evolve
from torch import Tensor

from quire.errors import CheckpointError
from quire.execution.checkpoint import Checkpoint, TensorInfo, listed, wrong_kind
from quire.execution.kv_scales import scale_names
from quire.execution.mapped_files import MappedFiles
from quire.execution.staged_files import StagedFiles
from quire.interfaces.model import Model, WeightNames
from quire.layers.attention import Attention
from quire.layers.embedding import Head, NoHead
from quire.layers.places import Place, own_names, places


class Source(Protocol):
    """Where tensors come from, in the order in which they were announced."""

    def fill(self, tensor: TensorInfo, target: Tensor) -> None:
        """Fill `target`, a view of a parameter, now or later in the order of the device."""

    def check(self) -> None:
        """Wait until all is there. Raises: CheckpointError for what is not finite."""

    def close(self) -> None:
        """Let go of files and threads."""


SOURCES: dict[str, Callable[[Sequence[TensorInfo], torch.device], Source]] = {
    "cpu": MappedFiles,
    "cuda": StagedFiles,
}

# As safetensors spells the floats of 8 bits.
NARROW = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def load_weights(model: Model, checkpoint: Checkpoint) -> None:
    """Fill the model from the checkpoint and let every layer repack as soon as it is full.

    Raises: CheckpointError listing missing, unexpected and wrong-shaped tensors, or naming one
    that is not finite.
    """
    expected, checkpoint = checked_places(model, checkpoint)
    device = next(p.device for p in model.parameters() if not p.is_meta)
    # Those of a model on the GPU travel while the next are read.
    tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.name in expected]
    tensors = _largest_first(tensors, expected)
    with contextlib.closing(SOURCES[device.type](tensors, device)) as source:
        _fill(source, tensors, expected)
        source.check()
    finish_tied_heads(model)


def checked_places(model: Model, checkpoint: Checkpoint) -> tuple[dict[str, Place], Checkpoint]:
    """Return the place of each tensor, and the checkpoint with the model's own names.

    Nothing is read; the model may be on device `meta`.
    Raises: CheckpointError listing missing, unexpected and wrong-shaped tensors.
    """
    expected = places(model)
    checkpoint = with_own_names(checkpoint, expected, model.weight_names)
    _check_names(expected, checkpoint, _ignored_names(model, checkpoint))
    return expected, checkpoint


def with_own_names(
    checkpoint: Checkpoint, expected: Iterable[str], rules: WeightNames
) -> Checkpoint:
    """Return the checkpoint with the model's own names."""
    names = own_names(checkpoint.tensors, set(expected), rules)
    tensors = {
        names[name]: evolve(tensor, name=names[name], stored_name=name)
        for name, tensor in checkpoint.tensors.items()
    }
    return Checkpoint(folder=checkpoint.folder, tensors=tensors)


def stored_dtypes(checkpoint: Checkpoint, rules: WeightNames) -> dict[str, str]:
    """Return the dtypes of a checkpoint's tensors by the names that a model may give them."""
    found: dict[str, str] = {}
    for name, own in own_names(checkpoint.tensors, set(), rules).items():
        bare = own.removeprefix(rules.base)
        found |= dict.fromkeys((rules.base + bare, bare), checkpoint.tensors[name].dtype)
    return found


def _largest_first(tensors: list[TensorInfo], expected: dict[str, Place]) -> list[TensorInfo]:
    """Bring layers whose weights are repacked from wider ones to the front, the widest first.

    One of them is wide at a time, and the widest while there is little beside it.
    """
    first: dict[int, tuple[int, int]] = {}
    for number, tensor in enumerate(tensors):
        owner = expected[tensor.name].owner
        wide = 0 if owner is None else owner.unallocated_bytes
        if wide:
            first.setdefault(id(owner), (-wide, number))
    last = (1, 0)  # what has its memory already, in the order of the files
    return sorted(tensors, key=lambda tensor: first.get(id(expected[tensor.name].owner), last))


def _fill(source: Source, tensors: list[TensorInfo], expected: dict[str, Place]) -> None:
    waiting = Counter(id(place.owner) for place in expected.values())
    begun: set[int] = set()
    for tensor in tensors:
        # Nothing here may hold a weight that its layer drops when it repacks: that would be the
        # whole model twice.
        owner = expected[tensor.name].owner
        if owner is not None and id(owner) not in begun:
            begun.add(id(owner))
            owner.allocate()
        target = expected.pop(tensor.name).view()
        _check_narrow(tensor, target)
        source.fill(tensor, target)
        del target
        waiting[id(owner)] -= 1
        if owner is not None and waiting[id(owner)] == 0:
            owner.finish_loading()


def _check_narrow(tensor: TensorInfo, target: Tensor) -> None:
    """Refuse to turn floats of 8 bits into others: their scales would be lost."""
    is_narrow = target.is_floating_point() and target.element_size() == 1
    stored = NARROW.get(tensor.dtype)
    if (is_narrow or stored is not None) and stored != target.dtype:
        raise wrong_kind(tensor, str(target.dtype))


def finish_tied_heads(model: Model) -> None:
    """Let heads repack that have no weight of their own, once the embedding is full."""
    for module in model.modules():
        if isinstance(module, Head) and module.is_tied:
            module.finish_loading()


def _ignored_names(model: Model, checkpoint: Checkpoint) -> set[str]:
    patterns = model.weight_names.ignored_among(checkpoint.tensors)
    tied = [m for m in model.modules() if isinstance(m, Head) and m.is_tied]
    # They are read when the backends of the KV cache are known.
    scales = scale_names(m for m in model.modules() if isinstance(m, Attention))
    # A tied head's own tensor, where a file has one, is the embedding again.
    patterns += [re.escape(head.spec.name) + r"\..*" for head in tied]
    # A model that gives vectors has none at all.
    absent = [m.name for m in model.modules() if isinstance(m, NoHead)]
    patterns += [re.escape(name) + r"\..*" for name in absent]
    return {
        name
        for name in checkpoint.tensors
        if name in scales or any(re.fullmatch(pattern, name) for pattern in patterns)
    }


def _check_names(expected: Mapping[str, Place], checkpoint: Checkpoint, ignored: set[str]) -> None:
    given = set(checkpoint.tensors) - (ignored - set(expected))
    problems = []
    missing = sorted(set(expected) - given)
    unexpected = sorted(given - set(expected))
    wrong = []
    for name in sorted(given & set(expected)):
        shape, wanted = checkpoint.tensors[name].shape, tuple(expected[name].view().shape)
        if shape != wanted and (shape, wanted) != ((), (1,)):
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
