"""Backends with a quantized cache and one mistake each; `QuantizedGather` is right."""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve
from broken_backends import broken
from gather_attention import GatherAttention, Plan
from torch import Tensor

from quire.interfaces.attention import QUANTIZED_KV_DTYPES, AttentionLayer, AttentionSpec
from quire.layers.quantized_cache import dequantize, quantize

Scales = tuple[Tensor, Tensor]


class QuantizedGather(GatherAttention):
    """Quantize what is written, and make the whole cache wide where it is read."""

    quantized_kv = QUANTIZED_KV_DTYPES

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Serve what the unquantized one serves, in a quantized cache too."""
        return super().why_unsupported(evolve(spec, kv_dtype=spec.dtype))

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan
    ) -> None:
        """Store each token in its slot."""
        if layer.k_scale is None:
            super().write(layer, k, v, kv_cache, plan)
            return
        k_scale, v_scale = self.scales_to_write(self.scales_of(layer))
        parts = self.stored(k, k_scale, kv_cache.dtype), self.stored(v, v_scale, kv_cache.dtype)
        kv_cache.flatten(0, 1)[plan.slots.long()] = torch.cat(parts, dim=-1)

    def attend(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, kv_cache: Any, *rest: Any
    ) -> None:
        """Keep the layer, whose scales are wanted."""
        self.layer = layer
        super().attend(layer, q, k, v, kv_cache, *rest)

    def gathered(self, cache: Tensor, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Gather from a wide copy of the sequence's tokens."""
        if self.layer.k_scale is None:
            return super().gathered(cache, slots, visible)
        k_scale, v_scale = self.scales_to_read(self.scales_of(self.layer))
        tokens = cache.flatten(0, 1)[slots][None]
        keys, values = tokens.tensor_split((self.spec.head_dim,), dim=-1)
        keys = dequantize(keys, k_scale, torch.float32)
        wide = torch.cat((keys, dequantize(values, v_scale, torch.float32)), dim=-1)
        return super().gathered(wide, torch.arange(len(slots)), visible)

    def scales_of(self, layer: AttentionLayer) -> Scales:
        """Return the scales of keys and of values."""
        assert layer.k_scale is not None
        assert layer.v_scale is not None
        return layer.k_scale, layer.v_scale

    def scales_to_write(self, scales: Scales) -> Scales:
        """Return what `write` divides by."""
        return scales

    def scales_to_read(self, scales: Scales) -> Scales:
        """Return what `attend` multiplies by."""
        return scales

    def stored(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what is stored of x."""
        return quantize(x, scale, dtype)


@broken("cache-scales-ignored", "the scales of the quantized cache are ignored")
class ScalesIgnored(QuantizedGather):
    def scales_to_read(self, scales: Scales) -> Scales:
        return torch.ones_like(scales[0]), torch.ones_like(scales[1])


@broken("cache-scales-squared", "the scales of the quantized cache are applied twice")
class ScalesSquared(QuantizedGather):
    def scales_to_read(self, scales: Scales) -> Scales:
        return scales[0] ** 2, scales[1] ** 2


@broken("key-scale-squared")
class KeyScaleSquared(QuantizedGather):
    def scales_to_read(self, scales: Scales) -> Scales:
        return scales[0] ** 2, scales[1]


@broken("cache-scales-of-another-head", "another head's scales")
class ScalesOfAnotherHead(QuantizedGather):
    def scales_to_read(self, scales: Scales) -> Scales:
        return scales[0].roll(-1), scales[1].roll(-1)


@broken("cache-scales-of-the-first-head")
class ScalesOfTheFirstHead(QuantizedGather):
    """Right where a tensor has one scale; written and read alike, it only rounds otherwise."""

    def scales_of(self, layer: AttentionLayer) -> Scales:
        k_scale, v_scale = super().scales_of(layer)
        return k_scale[:1].expand_as(k_scale), v_scale[:1].expand_as(v_scale)


@broken("key-scale-for-values")
class KeyScaleForValues(QuantizedGather):
    def scales_to_read(self, scales: Scales) -> Scales:
        return scales[0], scales[0]


@broken("key-and-value-scales-swapped", "with the values' scales")
class ScalesSwapped(QuantizedGather):
    def scales_to_read(self, scales: Scales) -> Scales:
        return scales[1], scales[0]


@broken("values-written-with-the-key-scale")
class ValuesWrittenWithTheKeyScale(QuantizedGather):
    def scales_to_write(self, scales: Scales) -> Scales:
        return scales[0], scales[0]


@broken("cache-scales-of-the-first-layer")
class ScalesOfTheFirstLayer(QuantizedGather):
    def scales_of(self, layer: AttentionLayer) -> Scales:
        self.first = getattr(self, "first", super().scales_of(layer))
        return self.first


@broken("beyond-the-range-nan")
class BeyondTheRangeNaN(QuantizedGather):
    def stored(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = x.float() / scale[:, None]
        beyond = wide.abs() > torch.finfo(dtype).max
        return torch.where(beyond, float("nan"), quantize(x, scale, dtype).float()).to(dtype)


@broken("nan-clipped", "a NaN is clipped")
class NanClipped(QuantizedGather):
    def stored(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        largest = torch.finfo(dtype).max
        return quantize(x.nan_to_num(largest), scale, dtype)


@broken("cut-instead-of-rounded")
class CutInsteadOfRounded(QuantizedGather):
    """Numbers are rounded towards zero."""

    def stored(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        found, numbers = quantize(x, scale, dtype), torch.finfo(dtype)
        wide = x.float() / scale[:, None]
        is_too_far = found.float().abs() > wide.abs()
        step = wide.abs() * numbers.eps / 2 + numbers.smallest_normal * numbers.eps / 2
        less = quantize(wide - step * wide.sign(), torch.ones_like(scale), dtype)
        return torch.where(is_too_far, less.float(), found.float()).to(dtype)
