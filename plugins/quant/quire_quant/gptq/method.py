"""Serve GPTQ checkpoints. Source: Frantar et al., "GPTQ", 2022; the files are GPTQModel's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.interfaces.quantization import (
    EmbeddingSpec,
    EncodedWeight,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
)
from quire_quant.config_values import multiple_needed
from quire_quant.gptq.product import GptqProduct
from quire_quant.gptq.settings import GptqSettings, ModuleSettings, only_settings
from quire_quant.packed import PackedForm, pack, part_names
from quire_quant.rounding import quantize


class Gptq(QuantizationMethod):
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
        if isinstance(spec, LinearSpec):
            return only_settings({name: self.settings.of(name) for name in part_names(spec)})
        return self.settings.of_head(spec.name) if spec.is_head else None

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Serve layers whose inputs make whole groups, and inputs and outputs whole words."""
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

    def method_for(self, spec: LayerSpec) -> LayerMethod | None:
        """Return the product of a layer that is quantized."""
        if not isinstance(spec, (LinearSpec, EmbeddingSpec)):
            return None
        settings = self._settings_of(spec)
        if settings is None:
            return None
        form = PackedForm.of(spec, settings.bits, settings.group_size)
        return GptqProduct(form, self.settings.zero_offset)

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
