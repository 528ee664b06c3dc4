"""Choose how each layer is kept in 8 bits: rounded at load, or as a checkpoint has it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from attrs import evolve

from quire.interfaces.quantization import (
    EmbeddingSpec,
    ExpertsMethod,
    ExpertsSpec,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
)
from quire_quant.compressed import CompressedTensors
from quire_quant.config_values import multiple_needed
from quire_quant.int8.formats import Scheme, read_schemes
from quire_quant.int8.rounded import Int8Product
from quire_quant.int8.stored import StoredInt8Product
from quire_quant.int8.weight_only import RoundedWeightOnly, StoredWeightOnly
from quire_quant.module_names import is_router, part_names
from quire_quant.packed_experts import experts_method, why_not_experts


def _refused(spec: LayerSpec) -> str | None:
    if isinstance(spec, (LinearSpec, EmbeddingSpec)):
        return None
    return f"it has no method for {type(spec).__name__}"


class Int8(QuantizationMethod):
    """Serve linears and heads in 8 bits; embeddings that are looked up stay as they are.

    Weights and activations of a full-precision checkpoint are rounded here; of a quantized one
    what its configuration says is.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read a `quantization_config`. Raises: ConfigError naming the key."""
        super().__init__(config)
        self._read: CompressedTensors | None = None
        self._schemes: dict[str, Scheme] = {}
        if config:
            self._read, self._schemes = read_schemes(config)

    def _scheme_of(self, name: str) -> Scheme | None:
        group = None if self._read is None else self._read.group_of(name)
        return None if group is None else self._schemes[group.name]

    def _with_plain_inputs(self) -> Int8:
        """Return the same for experts: their inputs stay as they are where rows have scales."""
        other = copy.copy(self)
        other._schemes = {
            name: evolve(scheme, inputs="plain") if scheme.inputs == "token" else scheme
            for name, scheme in self._schemes.items()
        }
        return other

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Serve linear and embedding layers whose projections are kept alike."""
        if isinstance(spec, ExpertsSpec):
            return why_not_experts(self._with_plain_inputs(), spec)
        if self._read is None or not isinstance(spec, LinearSpec):
            return _refused(spec)
        schemes = {name: self._scheme_of(name) for name in part_names(spec)}
        different = set(schemes.values())
        if len(different) > 1:
            told = ", ".join(f"{name}: {scheme}" for name, scheme in schemes.items())
            return f"its projections are one product, and config_groups keeps them apart ({told})"
        scheme = different.pop()
        size = None if scheme is None else scheme.group_size
        return multiple_needed("its inputs", spec.in_features, size) if size else None

    def method_for(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod | None:
        """Return a method in 8 bits for linears and heads, and for experts of a checkpoint."""
        if isinstance(spec, ExpertsSpec):
            return experts_method(self._with_plain_inputs(), spec)
        if isinstance(spec, EmbeddingSpec) and not spec.is_head:
            return None
        if not isinstance(spec, (LinearSpec, EmbeddingSpec)):
            return None
        if self._read is not None:
            scheme = self._scheme_of(part_names(spec)[0])
            if scheme is None:
                return None
            kind = StoredWeightOnly if scheme.inputs == "plain" else StoredInt8Product
            return kind(spec, scheme)
        if isinstance(spec, LinearSpec):
            return Int8Product(spec.out_features, spec.in_features, spec.dtype, spec.device)
        return Int8Product(spec.num_embeddings, spec.embedding_dim, spec.dtype, spec.device)


class Int8WeightOnly(QuantizationMethod):
    """Round the weights of linears; activations, embeddings and heads stay as they are."""

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Serve linear and embedding layers everywhere, experts where there is a product."""
        return why_not_experts(self, spec) if isinstance(spec, ExpertsSpec) else _refused(spec)

    def method_for(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod | None:
        """Return the product of a linear that is no router, or of experts."""
        if isinstance(spec, ExpertsSpec):
            return experts_method(self, spec)
        if not isinstance(spec, LinearSpec) or is_router(spec.name):
            return None
        return RoundedWeightOnly(spec)
