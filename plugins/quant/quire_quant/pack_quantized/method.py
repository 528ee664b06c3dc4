"""Serve compressed-tensors' `pack-quantized`, in which llm-compressor writes GPTQ and AWQ too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from attrs import frozen
from torch import Tensor

from quire.errors import ConfigError
from quire.interfaces.quantization import (
    EmbeddingSpec,
    EncodedWeight,
    ExpertsMethod,
    ExpertsSpec,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
)
from quire_quant import compressed
from quire_quant.config_values import group_size_of, multiple_needed
from quire_quant.module_names import part_names
from quire_quant.pack_quantized.product import PackQuantizedProduct
from quire_quant.packed import PackedForm, pack
from quire_quant.packed_experts import experts_method, why_not_experts
from quire_quant.rounding import quantize

FORMAT = "pack-quantized"
BITS = (4, 8)
STRATEGIES = ("group", "channel")
# Of the orders only these need the inputs' groups at run time.
ORDERED = ("group", "dynamic")
UNORDERED = (None, False, "weight", "static")


@frozen(kw_only=True)
class Scheme:
    """How the layers of one group are kept; without a size all inputs are one group."""

    bits: int
    group_size: int | None
    symmetric: bool
    has_order: bool


def read_scheme(group: compressed.Group) -> Scheme:
    """Read how a group's weights are kept. Raises: ConfigError naming the key."""
    where = f"{compressed.WHERE}: config_groups.{group.name}"
    if group.activations is not None:
        raise ConfigError(
            f"{where}.input_activations is {group.activations!r}; {FORMAT} is read with "
            "activations as they are. Take a checkpoint of weights alone (W4A16, W8A16)."
        )
    where, weights = f"{where}.weights", group.weights
    compressed.expect(weights, FORMAT, where, "type", ("int",))
    compressed.expect(weights, FORMAT, where, "dynamic", (False, None))
    strategy = compressed.expect(weights, FORMAT, where, "strategy", STRATEGIES)
    order = compressed.expect(weights, FORMAT, where, "actorder", UNORDERED + ORDERED)
    return Scheme(
        bits=compressed.expect(weights, FORMAT, where, "num_bits", BITS),
        group_size=group_size_of(weights, ("group_size",)) if strategy == "group" else None,
        symmetric=compressed.expect(weights, FORMAT, where, "symmetric", (True, False)),
        has_order=strategy == "group" and order in ORDERED,
    )


class PackQuantized(QuantizationMethod):
    """Serve linears and heads but those that the configuration ignores; embeddings stay."""

    example_config: ClassVar[Mapping[str, Any]] = {
        "quant_method": compressed.QUANT_METHOD,
        "format": FORMAT,
        "ignore": [],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": 32,
                    "symmetric": False,
                    "dynamic": False,
                },
            }
        },
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read a `quantization_config`. Raises: ConfigError naming the key."""
        super().__init__(config)
        self._read = compressed.read_groups(config, (FORMAT,))
        self._schemes = {group.name: read_scheme(group) for group in self._read.groups}

    def _scheme_of(self, name: str) -> Scheme | None:
        group = self._read.group_of(name)
        return None if group is None else self._schemes[group.name]

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Serve layers whose inputs make whole groups and words, and whose projections agree."""
        if isinstance(spec, ExpertsSpec):
            return why_not_experts(self, spec)
        if not isinstance(spec, (LinearSpec, EmbeddingSpec)):
            return f"it has no method for {type(spec).__name__}"
        if isinstance(spec, EmbeddingSpec) and not spec.is_head:
            return None
        names = part_names(spec)
        schemes = {name: self._scheme_of(name) for name in names}
        if len(set(schemes.values())) > 1:
            told = ", ".join(f"{name}: {_told(scheme)}" for name, scheme in schemes.items())
            return f"its projections are one product, and config_groups keeps them apart ({told})"
        scheme = schemes[names[0]]
        if scheme is None:
            return None
        form, word = PackedForm.of(spec, scheme.bits, scheme.group_size), 32 // scheme.bits
        unit = math.lcm(word, scheme.group_size or 1)
        reasons = [multiple_needed("its inputs", form.in_features, unit)]
        if not scheme.symmetric:
            for name, size in zip(names, form.part_sizes, strict=True):
                reasons.append(multiple_needed(f"the outputs of {name}", size, word))
        return next((reason for reason in reasons if reason), None)

    def method_for(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod | None:
        """Return the product of experts, or of a linear or head that is not ignored."""
        if isinstance(spec, ExpertsSpec):
            return experts_method(self, spec)
        is_head = isinstance(spec, EmbeddingSpec) and spec.is_head
        if not isinstance(spec, LinearSpec) and not is_head:
            return None
        assert isinstance(spec, (LinearSpec, EmbeddingSpec))
        scheme = self._scheme_of(part_names(spec)[0])
        if scheme is None:
            return None
        form = PackedForm.of(spec, scheme.bits, scheme.group_size)
        return PackQuantizedProduct(form, symmetric=scheme.symmetric, has_order=scheme.has_order)

    @classmethod
    def encode(cls, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        """Return a weight in the form of `example_config`, rounded to nearest."""
        weights = cls.example_config["config_groups"]["group_0"]["weights"]
        codes, scales, zeros = quantize(weight, weights["num_bits"], weights["group_size"])
        groups = codes.double().unflatten(1, (scales.shape[1], -1))
        exact = (groups - zeros.double()[..., None]) * scales.double()[..., None]
        tensors = {
            "weight_packed": pack(codes, weights["num_bits"]).view(torch.int32),
            "weight_scale": scales,
            "weight_zero_point": pack(zeros.T, weights["num_bits"]).view(torch.int32).T,
            "weight_shape": torch.tensor(weight.shape),
        }
        return EncodedWeight(tensors=tensors, weight=exact.flatten(1))


def _told(scheme: Scheme | None) -> str:
    if scheme is None:
        return "not quantized"
    return f"{scheme.bits} bits, group_size {scheme.group_size or -1}"
