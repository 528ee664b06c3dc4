"""Layers whose weights are in memory only while their block is worked on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from attrs import define
from torch import Tensor, nn

from quire.errors import CheckpointError, ConfigError
from quire.execution.checkpoint import Checkpoint, listed
from quire.execution.mapped_files import MappedFiles
from quire.interfaces.model import Model
from quire.interfaces.quantization import (
    EmbeddingSpec,
    ExpertsSpec,
    InputMoments,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
    QuantizedActivation,
    ShardRule,
    WeightLayer,
)
from quire.layers.embedding import Head
from quire.layers.places import Place, places
from quire.layers.weights import WeightStore


class Tensors:
    """The tensors of a checkpoint, mapped: they take no memory but the pages that are read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._open: dict[Path, Any] = {}

    def get(self, name: str) -> Tensor:
        """Return a tensor as the file has it."""
        from safetensors import safe_open

        file = self.checkpoint.tensors[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu").__enter__()
        found: Tensor = self._open[file].get_tensor(name)
        return found


def part_names(spec: Any) -> list[str]:
    """Return the checkpoint's names of the projections that a layer fuses; else the layer's."""
    parts, prefix = getattr(spec, "parts", ()), spec.name.rpartition(".")[0]
    if len(parts) < 2:
        return [spec.name]
    return [f"{prefix}.{part}" if prefix else part for part in parts]


@define
class InputSums:
    """Sums over the inputs of a layer: x x^T, |x|, and how many there were."""

    second: Tensor
    magnitude: Tensor
    count: int = 0

    @classmethod
    def empty(cls, size: int, device: torch.device) -> InputSums:
        """Return sums over nothing."""
        second = torch.zeros(size, size, device=device)
        return cls(second, torch.zeros(size, device=device))

    def add(self, x: Tensor) -> None:
        """Add inputs [num_tokens, size]."""
        wide = x.float()
        self.second.addmm_(wide.T, wide)
        self.magnitude += wide.abs().sum(0)
        self.count += x.shape[0]

    def moments(self) -> InputMoments:
        """Return the means; the sums are used up."""
        second = self.second.div_(self.count)
        return InputMoments(second=second, magnitude=self.magnitude.div_(self.count))


class StreamedProduct(LayerMethod):
    """x W^T + b; `sums` takes down what x was, `inputs` keeps it, where they are set."""

    def __init__(self, shape: tuple[int, int], dtype: str) -> None:
        self.shape = shape
        self.dtype = getattr(torch, dtype)
        self.sums: InputSums | None = None
        self.inputs: list[Tensor] | None = None

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight` [out_features, in_features] without memory."""
        weight = torch.empty(self.shape, dtype=self.dtype, device="meta")
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Return the product."""
        assert isinstance(x, Tensor)
        if self.sums is not None:
            self.sums.add(x)
        if self.inputs is not None:
            self.inputs.append(x.clone())
        return functional.linear(x, layer.get_weight("weight"), bias)


class StreamedLookup(LayerMethod):
    """Rows of a table that stays in its file."""

    def __init__(self, spec: EmbeddingSpec, tensors: Tensors) -> None:
        self.spec = spec
        self._tensors = tensors

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight` [num_embeddings, embedding_dim] without memory."""
        shape, dtype = (
            (self.spec.num_embeddings, self.spec.embedding_dim),
            getattr(torch, self.spec.dtype),
        )
        weight = torch.empty(shape, dtype=dtype, device="meta")
        layer.add_weight("weight", weight, ShardRule(output_dim=0))

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Return the embeddings of token ids `x` [num_tokens]."""
        assert isinstance(x, Tensor)
        table = self._tensors.get(f"{self.spec.name}.weight")
        rows = functional.embedding(x.cpu().long(), table)
        return rows.to(device=self.spec.device, dtype=getattr(torch, self.spec.dtype))


class Streaming(QuantizationMethod):
    """Keep every layer in the model's dtype, but its weights outside of memory."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__({})
        self._tensors = tensors

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Serve linear and embedding layers. Raises: ConfigError for experts."""
        if isinstance(spec, ExpertsSpec):
            raise ConfigError(
                f"`quire quantize` does not quantize experts, such as {spec.name!r}; "
                "`--quantization` with fp8, int4 or int8-weight-only does, as a model is loaded."
            )
        if isinstance(spec, (LinearSpec, EmbeddingSpec)):
            return None
        return f"`quire quantize` has no method for {type(spec).__name__}"

    def method_for(self, spec: LayerSpec) -> LayerMethod | None:
        """Return a product or a look-up."""
        if isinstance(spec, LinearSpec):
            return StreamedProduct((spec.out_features, spec.in_features), spec.dtype)
        assert isinstance(spec, EmbeddingSpec)
        if spec.is_head:
            return StreamedProduct((spec.num_embeddings, spec.embedding_dim), spec.dtype)
        return StreamedLookup(spec, self._tensors)


def check_names(model: Model, checkpoint: Checkpoint) -> dict[str, Place]:
    """Return where each tensor of the checkpoint goes.

    Raises: CheckpointError for tensors that are missing, have another shape, or are transposed.
    """
    wanted = places(model)
    transposed = sorted(name for name, place in wanted.items() if place.is_transposed)
    if transposed:
        raise CheckpointError(
            f"{checkpoint.folder}: {transposed[0]} is stored as [inputs, outputs], as no quantized "
            f"format has it; `--quantization` quantizes this model as it is loaded."
        )
    missing = sorted(set(wanted) - set(checkpoint.tensors))
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} tensors are missing: {listed(missing)}."
        )
    for name, place in wanted.items():
        shape, expected = checkpoint.tensors[name].shape, tuple(place.view().shape)
        if shape != expected:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {list(shape)}; config.json says {list(expected)}."
            )
    tied = [m.spec.name for m in model.modules() if isinstance(m, Head) and m.is_tied]
    ignored = model.weight_names.ignored_among(checkpoint.tensors)
    patterns = [*ignored, *(re.escape(name) + r"\..*" for name in tied)]
    strange = [
        name
        for name in sorted(set(checkpoint.tensors) - set(wanted))
        if not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
    if strange:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(strange)} tensors that the model has no place for: "
            f"{listed(strange)}."
        )
    return wanted


def fill(wanted: Mapping[str, Place], checkpoint: Checkpoint) -> None:
    """Give memory to the layers of some places and fill them from the checkpoint.

    Raises: CheckpointError naming a tensor that is not finite.
    """
    infos = [info for info in checkpoint.tensors.values() if info.name in wanted]
    source = MappedFiles(infos, torch.device("cpu"))
    for info in infos:
        place = wanted[info.name]
        if place.owner is not None:
            place.owner.allocate()
        source.fill(info, place.view())
    source.close()


def release(modules: Iterable[nn.Module]) -> None:
    """Take the memory of products' weights away again."""
    for module in modules:
        if isinstance(module, WeightStore) and isinstance(module.method, StreamedProduct):
            module.drop_weight("weight")
            module.method.create_weights(module)
