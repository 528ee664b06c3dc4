"""Latent attention in a decoder layer: project to queries and to a latent, attend, project back."""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.model import BuildContext, LatentOptions
from quire.layers.rotary import RotaryTable
from quire_models.norm import Norm

LATENT = "kv_a_proj_with_mqa"
# What the classes of Transformers have, whatever rms_norm_eps is.
LATENT_EPS = 1e-6


@frozen(kw_only=True)
class LatentSizes:
    """Sizes of latent attention, named as in config.json; without `q_lora_rank` q is one product.

    `bias` is of the projections to latents and back. `scale` multiplies scores.
    """

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool
    scale: float


class SideBySide(nn.Module):
    """Two projections of the same rows, of which only one has a bias."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """Return both outputs side by side."""
        return torch.cat((self.first(x), self.second(x)), -1)

    def after_norm(self, *_given: Any, **_kind: Any) -> None:
        """Answer that there is no fused form."""


class LatentSelfAttention(nn.Module):
    """`qkv_proj` gives queries, or what they are made of, and latents; the rest attends."""

    def __init__(
        self, name: str, index: int, sizes: LatentSizes, rotary: RotaryTable, build: BuildContext
    ) -> None:
        super().__init__()
        hidden, heads, rank = sizes.hidden_size, sizes.num_heads, sizes.q_lora_rank
        q_size = heads * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)
        self.kv_size = sizes.kv_lora_rank + sizes.qk_rope_head_dim
        self.q_b_proj: nn.Module | None = None
        if rank is not None:
            self.q_a_layernorm = Norm(rank, LATENT_EPS, build)
            self.q_b_proj = build.linear(f"{name}.q_b_proj", rank, q_size)
        self.qkv_proj = self._from_hidden(name, sizes, q_size if rank is None else rank, build)
        options = LatentOptions(
            layer_index=index,
            num_heads=heads,
            kv_lora_rank=sizes.kv_lora_rank,
            qk_nope_head_dim=sizes.qk_nope_head_dim,
            qk_rope_head_dim=sizes.qk_rope_head_dim,
            v_head_dim=sizes.v_head_dim,
            scale=sizes.scale,
            rotary=rotary,
            norm_eps=LATENT_EPS,
        )
        self.attn = build.latent_attention(name, options)
        made = heads * sizes.v_head_dim
        self.o_proj = build.linear(f"{name}.o_proj", made, hidden, bias=sizes.bias)

    def _from_hidden(
        self, name: str, sizes: LatentSizes, q_size: int, build: BuildContext
    ) -> nn.Module:
        hidden, bias = sizes.hidden_size, sizes.bias
        if bias and sizes.q_lora_rank is None:
            queries = build.linear(f"{name}.q_proj", hidden, q_size)
            latents = build.linear(f"{name}.{LATENT}", hidden, self.kv_size, bias=True)
            return SideBySide(queries, latents)
        first = "q_proj" if sizes.q_lora_rank is None else "q_a_proj"
        both = (q_size, self.kv_size)
        return build.linear(f"{name}.qkv_proj", hidden, both, bias=bias, parts=(first, LATENT))

    def forward(self, qkv: Tensor, batch: Batch, keep: Tensor | None) -> Tensor:
        """Return [num_tokens, hidden_size], or the rows in `keep` of it."""
        q, kv = qkv.split((qkv.shape[-1] - self.kv_size, self.kv_size), -1)
        if self.q_b_proj is not None:
            q = self.q_b_proj(self.q_a_layernorm(q.contiguous()))
        attended = self.attn(q, kv, batch)
        if keep is not None:
            attended = attended.index_select(0, keep)
        out: Tensor = self.o_proj(attended)
        return out
