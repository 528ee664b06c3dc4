"""Latents of the self-check, as a model projects them, and what should become of them."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.layers.attention import Attention
from quire.layers.latent_attention import LatentAttention, latent_key


class DrawnLatents:
    """The queries' part that is rotated and latents, both cut from wider rows."""

    def __init__(self, layer: Attention, num_tokens: int) -> None:
        assert isinstance(layer, LatentAttention), layer
        self._layer, weight = layer, layer.kv_a_layernorm.weight
        generator = torch.Generator().manual_seed(6)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

        rope = layer.latent.rope_head_dim
        turned = draw(num_tokens, layer.num_heads, rope + 8)[..., 8:]
        self.projected = turned, draw(num_tokens, layer.head_dim + 8)[:, 8:]
        self.norm = weight, layer.norm_eps

    def what_is_wrong(
        self, queries: Tensor, keys: Tensor, written: Tensor, positions: Tensor
    ) -> str | None:
        """Return what a backend gives that is beyond twice the error of plain PyTorch."""
        exact = self._formula(positions, torch.float64)
        plain = self._formula(positions, keys.dtype)
        found = queries[..., self._layer.latent.kv_lora_rank :], keys
        unit = torch.finfo(keys.dtype).eps
        for name, out, right, usual in zip(("queries", "keys"), found, exact, plain, strict=True):
            bound = unit * right.abs().max() + 2 * (usual.double() - right).abs().max()
            error = (out.cpu().double() - right).abs().nan_to_num(torch.inf).max()
            if not error <= bound:
                return f"gives {name} that are off by {error:.3g}, bound {bound:.3g},"
        same = torch.equal(written, keys.to(written.dtype))
        return None if same else "writes other keys than it gives"

    def _formula(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        table, (weight, eps) = self._layer.rotary, self.norm
        assert table is not None, "latent attention rotates a part of each head"
        rotary, at = table.in_dtype(dtype), positions.cpu()
        turned, kv = (x.cpu().to(dtype) for x in self.projected)
        norm = (weight.cpu().to(dtype), eps)
        return rotary.rotate(turned, at), latent_key(kv, at, rotary, norm)
