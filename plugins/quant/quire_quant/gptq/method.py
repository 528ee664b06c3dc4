"""Serve GPTQ checkpoints. Source: Frantar et al., "GPTQ", 2022; the files are GPTQModel's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
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
)
from quire_quant.config_values import multiple_needed
from quire_quant.gptq.product import GptqProduct
from quire_quant.gptq.settings import GptqSettings, ModuleSettings, only_settings
from quire_quant.module_names import part_names
from quire_quant.packed import PackedForm, pack
from quire_quant.packed_experts import experts_method, why_not_experts
from quire_quant.plain_modules import PackedMethod
from quire_quant.rounding import quantize


class Gptq(PackedMethod):
    """Serve linears, and the head where `lm_head` says so; embeddings stay as they are."""

    example_config: ClassVar[Mapping[str, Any]] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": "gptq",
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.settings = GptqSettings(config)

    def _settings_of(self, spec: LinearSpec | EmbeddingSpec) -> ModuleSettings | None:
        if not isinstance(spec, LinearSpec):
            is_quantized = spec.is_head and not self.is_left_alone(spec.name, spec)
            return self.settings.of_head(spec.name) if is_quantized else None
        return only_settings(
            {
                name: None if self.is_left_alone(name, spec) else self.settings.of(name)
                for name in part_names(spec)
            }
        )

    def _has_indices(self, names: Sequence[str]) -> bool:
        """Answer whether a layer reads `g_idx`; where inputs lie in order it may be left out."""
        if self.settings.desc_act or not self.stored:
            return True
        return any(f"{name}.g_idx" in self.stored for name in names)

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Serve layers whose inputs make whole groups, and inputs and outputs whole words."""
        if isinstance(spec, ExpertsSpec):
            return why_not_experts(self, spec)
        if not isinstance(spec, (LinearSpec, EmbeddingSpec)):
            return f"it has no method for {type(spec).__name__}"
        try:
            settings = self._settings_of(spec)
        except ConfigError as error:
            return str(error)
        if settings is None:
            return None
        form = PackedForm.of(spec, settings.bits, settings.group_size)
        word = 32 // math.gcd(32, settings.bits)
        unit = math.lcm(word, settings.group_size or 1)
        reasons = [multiple_needed("its inputs", form.in_features, unit)]
        for name, size in zip(part_names(spec), form.part_sizes, strict=True):
            reasons.append(multiple_needed(f"the outputs of {name}", size, word))
        return next((reason for reason in reasons if reason), None)

    def method_for(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod | None:
        """Return the product of experts, or of a layer that is quantized."""
        if isinstance(spec, ExpertsSpec):
            return experts_method(self, spec)
        if not isinstance(spec, (LinearSpec, EmbeddingSpec)):
            return None
        settings = self._settings_of(spec)
        if settings is None:
            return None
        form = PackedForm.of(spec, settings.bits, settings.group_size)
        has_indices = self._has_indices(part_names(spec))
        return GptqProduct(form, self.settings.zero_offset, has_indices=has_indices)

    @classmethod
    def encode(cls, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        """Return a weight in the form of `example_config`, rounded to nearest."""
        bits, group_size = cls.example_config["bits"], cls.example_config["group_size"]
        codes, scales, zeros = quantize(weight, bits, group_size)
        groups = codes.double().unflatten(1, (scales.shape[1], -1))
        exact = (groups - zeros.double()[..., None]) * scales.double()[..., None]
        stored = (zeros.T - 1) & (2**bits - 1)
        tensors = {
            "qweight": pack(codes, bits).view(torch.int32).T.contiguous(),
            "qzeros": pack(stored, bits).view(torch.int32),
            "scales": scales.T.contiguous(),
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group_size,
        }
        return EncodedWeight(tensors=tensors, weight=exact.flatten(1))
