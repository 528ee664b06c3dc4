"""Backends of latent attention with one mistake each; `LatentGather` is right."""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve
from broken_backends import broken
from gather_attention import GatherAttention, Plan
from torch import Tensor

from quire.interfaces.attention import AttentionLayer, AttentionSpec, KVLayout, latent_layout
from quire.layers.rotary import RotaryTable


class LatentGather(GatherAttention):
    """Keep a token's latent once, and take its first numbers for the value."""

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Serve what the other one serves, of latents too."""
        return super().why_unsupported(evolve(spec, latent=None))

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Keep latents as all backends do."""
        return super().kv_layout(spec) if spec.latent is None else latent_layout(spec)

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Plan
    ) -> None:
        """Store keys alone where they are latents."""
        if self.spec.latent is None:
            super().write(layer, k, v, kv_cache, plan)
        else:
            kv_cache.flatten(0, 1)[plan.slots.long()] = self.stored(k[:, 0])

    def stored(self, latents: Tensor) -> Tensor:
        """Return what the cache holds."""
        return latents

    def gathered(self, cache: Tensor, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents of a sequence, for all heads, and their first numbers."""
        if self.spec.latent is None:
            return super().gathered(cache, slots, visible)
        tokens = cache.flatten(0, 1)[slots]
        tokens = torch.where(visible.any(0)[:, None], tokens, 0).float()
        return self.parts(tokens.expand(self.spec.num_heads, -1, -1))

    def parts(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [num_heads, keys, ..]."""
        return latents, latents[..., : self.spec.value_head_dim]

    @property
    def rope(self) -> int:
        """Return how many numbers of a latent are rotated."""
        assert self.spec.latent is not None
        return self.spec.latent.rope_head_dim


@broken("latent-without-its-rotated-part", "rotated part is left out")
class WithoutRotated(LatentGather):
    def parts(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.cat((latents[..., : -self.rope], 0 * latents[..., -self.rope :]), -1)
        return keys, latents[..., : -self.rope]


@broken("latent-values-at-its-end", "a latent's last numbers")
class ValuesAtEnd(LatentGather):
    def parts(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return latents, latents[..., self.rope :]


@broken("latent-of-two-parts-swapped")
class PartsSwapped(LatentGather):
    def parts(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        turned = latents.roll(self.rope, -1)
        return turned, latents[..., : -self.rope]


@broken("latent-rotated-part-not-stored")
class RotatedNotStored(LatentGather):
    def stored(self, latents: Tensor) -> Tensor:
        return torch.cat((latents[..., : -self.rope], 0 * latents[..., -self.rope :]), -1)


@broken("latent-scaled-by-its-own-size")
class ScaledByLatent(LatentGather):
    """Right where the model's heads are as wide as a latent, and nowhere else."""

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        if self.spec.latent is None:
            return super().scores(q, keys)
        return self.capped(q.float().transpose(0, 1) @ keys.mT * self.spec.head_dim**-0.5)


@broken("latent-in-half-precision")
class HalfPrecision(LatentGather):
    def stored(self, latents: Tensor) -> Tensor:
        return latents.bfloat16().to(latents.dtype)


@broken("latent-of-sixteen-heads-at-most")
class SixteenHeads(LatentGather):
    """A tile has sixteen rows: what further heads find is never stored."""

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Any,
        plan: Plan,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        found = torch.empty_like(out)
        super().attend(layer, q, k, v, kv_cache, plan, found, lse)
        shown = 16 if self.spec.latent is not None else self.spec.num_heads
        out[:, :shown] = found[:, :shown]


@broken("latent-of-the-step-only")
class StepOnly(LatentGather):
    """Takes values from the step where the whole sequence is in it, and the wrong end of them."""

    def attend(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, kv_cache: Any, *rest: Any
    ) -> None:
        if self.spec.latent is not None and len(q) > 1:
            kv_cache = kv_cache.clone()
            kv_cache.flatten(0, 1)[rest[0].slots.long()] = k[:, 0].roll(1, 0)
        super().attend(layer, q, k, v, kv_cache, *rest)


@broken("latent-in-a-layout-of-its-own", "all backends keep")
class OwnLayout(LatentGather):
    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        return evolve(super().kv_layout(spec), name="mine")


class FusedLatentGather(LatentGather):
    """Norm, rotate and write latents in one call."""

    def rotate_and_write_latents(
        self,
        layer: AttentionLayer,
        projected: tuple[Tensor, Tensor],
        positions: Tensor,
        rotary: Any,
        norm: tuple[Tensor, float],
        kv_cache: Tensor,
        plan: Plan,
    ) -> tuple[Tensor, Tensor] | None:
        """Do one after the other."""
        (turned, kv), rank = projected, self.spec.value_head_dim
        queries = turned.new_empty(*turned.shape[:2], self.spec.head_dim)
        queries[..., rank:] = self.turned(turned, positions, rotary)
        own = self.turned(kv[:, None, rank:], positions, rotary)[:, 0]
        key = torch.cat((self.normed(kv[:, :rank], norm), own), -1)
        kv_cache.flatten(0, 1)[plan.slots.long()] = key
        return queries, key

    def turned(self, x: Tensor, positions: Tensor, rotary: Any) -> Tensor:
        """Return rotated heads."""
        return rotary.rotate(x, positions)

    def normed(self, latent: Tensor, norm: tuple[Tensor, float]) -> Tensor:
        """Return normed latents."""
        wide, (weight, eps) = latent.float(), norm
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        return (wide * scale).to(latent.dtype) * weight


class LatentsAlone(FusedLatentGather):
    """Serve nothing else."""

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        return "it has latents alone" if spec.latent is None else super().why_unsupported(spec)


@broken("latent-pairs-rotated-as-halves")
class PairsAsHalves(FusedLatentGather):
    def turned(self, x: Tensor, positions: Tensor, rotary: Any) -> Tensor:
        plain = RotaryTable(rotary.cos, rotary.sin, rotary.head_dim, x.dtype)
        return plain.rotate(x, positions)


@broken("latent-norm-without-its-weight")
class NormWithoutWeight(FusedLatentGather):
    def normed(self, latent: Tensor, norm: tuple[Tensor, float]) -> Tensor:
        return super().normed(latent, (torch.ones_like(norm[0]), norm[1]))


@broken("latent-rows-taken-as-contiguous")
class RowsAsContiguous(FusedLatentGather):
    """Reads latents as if nothing lay between their rows."""

    def normed(self, latent: Tensor, norm: tuple[Tensor, float]) -> Tensor:
        start = latent.storage_offset()
        whole = latent.as_strided((latent.shape[0] * latent.shape[1],), (1,), start)
        return super().normed(whole.view(latent.shape), norm)
