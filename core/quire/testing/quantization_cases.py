"""A layer for a quantization method as a value, and how the kit makes and loads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import Factory, define, evolve, frozen
from torch import Tensor

from quire.interfaces.quantization import (
    EmbeddingSpec,
    EncodedWeight,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
)
from quire.layers.embedding import Embedding, Head
from quire.layers.linear import Linear
from quire.layers.places import places_of_layer
from quire.layers.weights import WeightStore
from quire.testing.dense_layers import PlainWeight

PARTS = ("q_proj", "k_proj", "v_proj")
# How large the weights of each part are: shards that share a scale would lose the small ones.
PART_SIZES = (1.0, 0.05, 20.0)
# What real models have now and then: activations far larger than their neighbours, rows of padding,
# pruned outputs. One of the two latter has others beside it, whose size the bound is taken of.
OUTLIER, ZERO_ROW = "an input far larger than the others", "a row of zeros"
ZERO_OUTPUT = "an output whose weights are zeros"
UNUSUAL = ("", OUTLIER, ZERO_ROW, ZERO_OUTPUT)
Encode = Callable[[Tensor, LayerSpec], EncodedWeight | None]


@frozen(kw_only=True)
class QuantizationSubject:
    """The method that is checked, and what its author says of it.

    `encode` gives a projection's tensors in the method's format. `rounded_input` says what
    becomes of activations that the method rounds. `rounding` is the largest error of a weight, as
    a fraction of its projection's largest. `weight_bytes` is what a layer may hold.
    """

    method: type[QuantizationMethod]
    config: Mapping[str, Any]
    device: str = "cpu"
    encode: Encode | None = None
    rounded_input: Callable[[Tensor, LayerSpec], Tensor] | None = None
    rounding: float | None = None
    weight_bytes: Callable[[LinearSpec], int] | None = None
    excluded: Sequence[str] = ()

    def make(self) -> QuantizationMethod:
        """Return an instance."""
        return self.method(self.config)

    def encoded(self, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        """Return a projection's weight in the method's format; None: as it is."""
        encode = self.encode or self.method.encode
        return encode(weight, spec)


@frozen(kw_only=True)
class LayerCase:
    """A layer and its inputs. `kind`: linear, head, tied head or embedding.

    `sizes` are the outputs of each projection. `strided`: rows of x are cut from a wider tensor.
    `unusual` is one of `UNUSUAL`.
    """

    kind: str = "linear"
    in_features: int
    sizes: tuple[int, ...]
    bias: bool = False
    dtype: str = "float32"
    rows: int = 1
    strided: bool = False
    seed: int = 0
    batch_invariant: bool = False
    unusual: str = ""

    def __str__(self) -> str:
        outs = "+".join(map(str, self.sizes))
        bias = " with bias" if self.bias else ""
        layout = "cut from a wider tensor" if self.strided else "contiguous"
        plural = "" if self.rows == 1 else "s"
        return (
            f"{self.rows} row{plural} through a {self.kind} of {self.in_features} -> {outs}{bias}; "
            f"{self.dtype}; x {layout}; seed {self.seed}{self.unusual and '; '}{self.unusual}"
        )


def spec_of(case: LayerCase, device: str, *, name: str = "") -> LinearSpec | EmbeddingSpec:
    """Return what the builder of a model would ask a method about."""
    if case.kind != "linear":
        is_head = case.kind != "embedding"
        return EmbeddingSpec(
            name=name or ("lm_head" if is_head else "model.embed_tokens"),
            num_embeddings=sum(case.sizes),
            embedding_dim=case.in_features,
            is_head=is_head,
            dtype=case.dtype,
            device=device,
            batch_invariant=case.batch_invariant,
        )
    parts = PARTS[: len(case.sizes)] if len(case.sizes) > 1 else ("o_proj",)
    whole = "qkv_proj" if len(parts) > 1 else "o_proj"
    return LinearSpec(
        name=name or f"model.layers.0.self_attn.{whole}",
        parts=parts,
        in_features=case.in_features,
        output_sizes=case.sizes,
        bias=case.bias,
        dtype=case.dtype,
        device=device,
        batch_invariant=case.batch_invariant,
    )


@define(kw_only=True)
class Loaded:
    """A layer that is ready, what was put into it, and the weight [out, in] that it stands for.

    `exact` is float64: the encoded weight, or the given one in the layer's dtype. `is_exact`: the
    layer must multiply with it; else with something near.
    """

    layer: WeightStore
    exact: Tensor
    bias: Tensor | None
    is_exact: bool
    held_before: int
    embedding: Embedding | None = None

    @property
    def method(self) -> LayerMethod:
        """How the layer keeps its weights."""
        found = self.layer.method
        assert isinstance(found, LayerMethod), found
        return found


def draw(case: LayerCase, *shape: int, salt: int) -> Tensor:
    """Draw normal numbers, float32, on the CPU."""
    generator = torch.Generator().manual_seed(1000 * case.seed + salt)
    return torch.randn(*shape, generator=generator)


def make_input(case: LayerCase, device: str) -> Tensor:
    """Return x [rows, in_features], or token ids of an embedding."""
    if case.kind == "embedding":
        generator = torch.Generator().manual_seed(case.seed)
        ids = torch.randint(0, sum(case.sizes), (case.rows,), generator=generator)
        return ids.to(device, torch.int32)
    dtype = getattr(torch, case.dtype)
    width = case.in_features * (2 if case.strided else 1)
    x = draw(case, case.rows, width, salt=1)
    if case.unusual == OUTLIER:
        # What comes out must be finite in float16.
        x[:, -1 - case.seed % case.in_features] *= 100 if dtype is torch.float16 else 1e5
    if case.unusual == ZERO_ROW and case.rows > 1:
        x[case.seed % case.rows] = 0
    x = x.to(device, dtype)
    return x[:, case.in_features :] if case.strided else x


def make_layer(
    subject: QuantizationSubject, method: QuantizationMethod, case: LayerCase
) -> Loaded | None:
    """Make a layer, fill it as the engine does, let it repack; None: the method leaves it alone."""
    spec = spec_of(case, subject.device)
    layer_method = method.method_for(spec)
    if layer_method is None:
        return None
    assert isinstance(layer_method, LayerMethod), layer_method
    if isinstance(spec, LinearSpec):
        return fill(subject, Linear(spec, layer_method), case)
    if not spec.is_head:
        return fill(subject, Embedding(spec, layer_method), case)
    if case.kind == "head":
        return fill(subject, Head(spec, layer_method, None), case)
    embedding = _tied_embedding(subject, method, case)
    head = Head(spec, layer_method, embedding.layer)  # type: ignore[arg-type]
    head.finish_loading()
    return Loaded(
        layer=head,
        exact=embedding.exact,
        bias=None,
        is_exact=embedding.is_exact,
        held_before=0,
        embedding=embedding.layer,  # type: ignore[arg-type]
    )


def _tied_embedding(
    subject: QuantizationSubject, method: QuantizationMethod, case: LayerCase
) -> Loaded:
    spec = spec_of(_as_kind(case, "embedding"), subject.device)
    assert isinstance(spec, EmbeddingSpec)
    shape = (spec.num_embeddings, spec.embedding_dim)
    layer_method = method.method_for(spec) or PlainWeight(shape, spec)
    assert isinstance(layer_method, LayerMethod), layer_method
    return fill(subject, Embedding(spec, layer_method), _as_kind(case, "embedding"))


def _as_kind(case: LayerCase, kind: str) -> LayerCase:
    return evolve(case, kind=kind, bias=False)


def fill(subject: QuantizationSubject, layer: WeightStore, case: LayerCase) -> Loaded:
    """Fill a layer's weights, each projection's into its slice, and let it repack."""
    spec, dtype = layer.spec, getattr(torch, case.dtype)
    given = [
        draw(case, size, case.in_features, salt=10 + i) * PART_SIZES[i] / case.in_features**0.5
        for i, size in enumerate(case.sizes)
    ]
    bias = draw(case, sum(case.sizes), salt=2).to(dtype) if case.bias else None
    is_plain = _is_plain(layer, case, dtype)
    encoded = [None if is_plain else subject.encoded(weight, spec) for weight in given]
    if case.unusual == ZERO_OUTPUT and encoded[0] is None and case.sizes[0] > 1:
        given[0][case.seed % case.sizes[0]] = 0
    tensors: dict[str, Tensor] = {}
    exact: list[Tensor] = []
    biases = [None] * len(given) if bias is None else list(bias.split(case.sizes))
    for i, weight in enumerate(given):
        prefix = _name_of_part(spec, i)
        if biases[i] is not None:
            tensors[f"{prefix}.bias"] = biases[i]  # type: ignore[assignment]
        code = encoded[i]
        if code is None:
            tensors[f"{prefix}.weight"] = weight.to(dtype)
            exact.append(weight.to(dtype).double())
            continue
        tensors.update({f"{prefix}.{name}": tensor for name, tensor in code.tensors.items()})
        # What projections have in common lies at the layer's own name.
        tensors.update({f"{spec.name}.{name}": tensor for name, tensor in code.tensors.items()})
        exact.append(code.weight.double())
    load(layer, tensors)
    held = held_bytes(layer)
    layer.finish_loading()
    return Loaded(
        layer=layer,
        exact=torch.cat(exact).to(subject.device),
        bias=None if bias is None else bias.to(subject.device),
        # Kept in fewer bits it cannot be the very weight that was given.
        is_exact=encoded[0] is not None or not stored_bits(layer),
        held_before=held,
    )


def _name_of_part(spec: Any, i: int) -> str:
    parts = getattr(spec, "parts", ())
    if len(parts) < 2:
        return str(spec.name)
    return f"{spec.name.rpartition('.')[0]}.{parts[i]}"


def _is_plain(layer: WeightStore, case: LayerCase, dtype: torch.dtype) -> bool:
    """Answer whether the checkpoint holds the layer's weight as it is."""
    if set(layer.rules) - {"bias"} != {"weight"}:
        return False
    weight = layer.get_weight("weight")
    return weight.dtype == dtype and tuple(weight.shape) == (sum(case.sizes), case.in_features)


def load(layer: WeightStore, tensors: Mapping[str, Tensor]) -> None:
    """Poison all weights, then fill each from the tensor of its name.

    Raises: ValueError for a weight without a tensor, or one of another shape.
    """
    layer.allocate()
    for parameter in layer.parameters(recurse=False):
        poison(parameter.data)
    for name, place in places_of_layer(layer):
        tensor, view = tensors.get(name), place.view()
        if tensor is None:
            raise ValueError(f"{name} is wanted; the checkpoint has {', '.join(sorted(tensors))}")
        if tuple(tensor.shape) != tuple(view.shape):
            shapes = f"{list(tensor.shape)} instead of {list(view.shape)}"
            raise ValueError(f"{name} in the checkpoint is {shapes}")
        view.copy_(tensor)


def poison(tensor: Tensor) -> None:
    """Fill memory that is not loaded yet: NaN, or the largest whole number."""
    if tensor.is_floating_point():
        tensor.copy_(torch.full(tensor.shape, float("nan")))
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


def tensors_of(thing: Any, depth: int = 3) -> list[Tensor]:
    """Return the tensors that an object holds, itself or in what it holds."""
    if isinstance(thing, Tensor):
        return [thing]
    if depth == 0 or isinstance(thing, (str, bytes, int, float, type, type(None))):
        return []
    if isinstance(thing, Mapping):
        inside = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        inside = list(thing)
    else:
        inside = list(getattr(thing, "__dict__", {}).values())
    return [tensor for part in inside for tensor in tensors_of(part, depth - 1)]


@define
class _Held:
    """Bytes of tensors, each memory counted once."""

    seen: set[Any] = Factory(set)
    num_bytes: int = 0

    def add(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            key, size = id(tensor), tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.num_bytes += size


def held_bytes(layer: WeightStore) -> int:
    """Return the bytes of all tensors that a layer and its method hold."""
    held = _Held()
    for tensor in [*tensors_of(dict(layer._parameters)), *tensors_of(vars(layer.method))]:
        held.add(tensor)
    for tensor in tensors_of(dict(layer._buffers)):
        held.add(tensor)
    return held.num_bytes


def stored_bits(layer: WeightStore) -> float:
    """Return how many bits a weight has where it is kept in fewer than 16, else 0."""
    spec = layer.spec
    rows = getattr(spec, "out_features", None) or spec.num_embeddings
    columns = getattr(spec, "in_features", None) or spec.embedding_dim
    held = [*tensors_of(dict(layer._parameters)), *tensors_of(vars(layer.method))]
    packed = [t for t in held if t.dim() > 1 and not (t.is_floating_point() and t.itemsize > 1)]
    if not packed:
        return 0
    largest = max(packed, key=lambda t: t.numel() * t.itemsize)
    return 8 * largest.numel() * largest.itemsize / (rows * columns)
