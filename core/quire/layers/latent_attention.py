"""Multi-head latent attention: one compressed key and value a token, shared by all heads.

A head's key is its part of `kv_b_proj` times the latent, then the rotated part; its value is
another part of `kv_b_proj` times the latent. The cache holds latents alone, in either form:

    absorbed   queries are multiplied by the keys' part and attend to latents, as one KV head;
               what they find is multiplied by the values' part
    plain      keys and values are made of all latents of a sequence: fewer operations from some
               hundred new tokens on, see `LatentSpec.fewest_plain_tokens`
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from attrs import evolve
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from quire.interfaces.attention import AttentionBackend, AttentionSpec, GraphSupport, LatentSpec
from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, LatentOptions
from quire.layers.attention import Attention
from quire.layers.rotary import RotaryTable


class LatentWeight(nn.Module):
    """A weight of the layer, which is found under the module's name."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        empty = torch.empty(shape, dtype=dtype, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)


class LatentAttention(Attention):
    """Normalise and rotate a token's latent, write it, attend in one form or the other."""

    def __init__(
        self,
        options: LatentOptions,
        dtype: torch.dtype,
        device: torch.device,
        *,
        name: str = "",
        kv_b_proj: nn.Module | None = None,
    ) -> None:
        """Make the layer; `kv_b_proj` has a `weight` once it is loaded. None: a plain one."""
        rank, rope = options.kv_lora_rank, options.qk_rope_head_dim
        as_one_head = AttentionOptions(
            layer_index=options.layer_index,
            num_heads=options.num_heads,
            num_kv_heads=1,
            head_dim=rank + rope,
            scale=options.scale,
            rotary=options.rotary,
        )
        super().__init__(as_one_head, dtype, device, name=name)
        self.norm_eps = options.norm_eps
        latent = LatentSpec(
            kv_lora_rank=rank,
            rope_head_dim=rope,
            nope_head_dim=options.qk_nope_head_dim,
            v_head_dim=options.v_head_dim,
        )
        self.latent = evolve(latent, plain_from=latent.fewest_plain_tokens)
        made = options.num_heads * (latent.nope_head_dim + latent.v_head_dim)
        self.kv_a_layernorm = LatentWeight(rank, dtype=dtype, device=device)
        self.kv_b_proj = kv_b_proj or LatentWeight(made, rank, dtype=dtype, device=device)

    def spec(self, *, dtype: str, kv_dtype: str, block_size: int, device: str) -> AttentionSpec:
        """Return the spec of the absorbed form."""
        spec = super().spec(dtype=dtype, kv_dtype=kv_dtype, block_size=block_size, device=device)
        return evolve(spec, value_head_dim=self.latent.kv_lora_rank, latent=self.latent)

    def bind(self, backend: AttentionBackend, kv_cache: Tensor | None, group: int) -> None:
        """Give the layer its backend; heads are not rotated by it."""
        super().bind(backend, kv_cache, group)
        self.has_fused_write = False

    def forward(self, q: Tensor, kv: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return [num_tokens, num_heads * v_head_dim].

        `q` [num_tokens, num_heads * (qk_nope_head_dim + qk_rope_head_dim)], `kv` [num_tokens,
        kv_lora_rank + qk_rope_head_dim] as it was projected: neither normed nor rotated.
        """
        assert self.rotary is not None, "latent attention rotates a part of each head"
        sizes = self.latent
        heads = q.view(q.shape[0], self.num_heads, -1)
        nope, turned = heads.split((sizes.nope_head_dim, sizes.rope_head_dim), -1)
        plan, plain = batch.plans[self.group], sizes.plain_rows(batch)
        assert self.kv_cache is not None, "latents are read from the cache"
        queries, key = self._written(turned, kv, batch.positions, plan)
        as_head = key.unsqueeze(1)
        value = as_head[..., : sizes.kv_lora_rank]
        # Backends leave the rows that pad a captured step, where later layers must find numbers.
        is_padded = batch.captured_for is GraphSupport.ANY
        make = q.new_zeros if is_padded else q.new_empty
        out = make(len(q), self.num_heads, sizes.v_head_dim)
        parts = _other_tokens(batch, plain) if plain else [slice(0, len(q))]
        if parts:
            self._absorb(nope, parts, queries)
            found = make(len(q), self.num_heads, sizes.kv_lora_rank)
            self.backend.attend(self, queries, as_head, value, self.kv_cache, plan, found)
            self._from_latents(found, parts, out)
        for row in plain:
            first = sum(batch.query_lens[:row])
            own = slice(first, first + batch.query_lens[row])
            query = torch.cat((nope[own], queries[own][..., sizes.kv_lora_rank :]), -1)
            self._attend_plain(query, self._latents(key[own], row, batch), out[own])
        return out.flatten(1)

    def _written(
        self, turned: Tensor, kv: Tensor, positions: Tensor, plan: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys; return queries whose rotated part is filled, and the keys."""
        assert self.rotary is not None, "latent attention rotates a part of each head"
        assert self.kv_cache is not None, "latents are read from the cache"
        norm, rank = (self.kv_a_layernorm.weight, self.norm_eps), self.latent.kv_lora_rank
        fused = self.backend.rotate_and_write_latents(
            self, (turned, kv), positions, self.rotary, norm, self.kv_cache, plan
        )
        if fused is not None:
            return fused
        queries = turned.new_empty(*turned.shape[:2], self.head_dim)
        queries[..., rank:] = self.rotary.rotate(turned, positions)
        key = self._key(kv, positions)
        as_head = key.unsqueeze(1)
        self.backend.write(self, as_head, as_head[..., :rank], self.kv_cache, plan)
        return queries, key

    def _key(self, kv: Tensor, positions: Tensor) -> Tensor:
        """Return the normed latents and rotated parts, [num_tokens, head_dim]."""
        assert self.rotary is not None, "latent attention rotates a part of each head"
        norm = (self.kv_a_layernorm.weight, self.norm_eps)
        return latent_key(kv, positions, self.rotary, norm)

    @property
    def _kv_weight(self) -> Tensor:
        """What makes keys and values, [num_heads, nope_head_dim + v_head_dim, rank]."""
        weight: Tensor = self.kv_b_proj.weight  # type: ignore[assignment]
        return weight.unflatten(0, (self.num_heads, -1))

    def _parts_of_heads(self) -> tuple[Tensor, Tensor]:
        """Return what makes keys, [num_heads, nope_head_dim, rank], and values, [.., v, rank]."""
        sizes = self.latent
        weight = self._kv_weight
        keys, values = weight.split((sizes.nope_head_dim, sizes.v_head_dim), 1)
        return keys, values

    def _absorb(self, nope: Tensor, parts: list[slice], queries: Tensor) -> None:
        """Fill what of `queries` [num_tokens, num_heads, head_dim] is not rotated, in `parts`."""
        keys, rank = self._parts_of_heads()[0], self.latent.kv_lora_rank
        for part in parts:
            into = queries[part].transpose(0, 1)[..., :rank]
            torch.bmm(nope[part].transpose(0, 1), keys, out=into)

    def _from_latents(self, found: Tensor, parts: list[slice], out: Tensor) -> None:
        """Fill rows of `out` with the values that sums of latents stand for."""
        values = self._parts_of_heads()[1].mT
        for part in parts:
            torch.bmm(found[part].transpose(0, 1), values, out=out[part].transpose(0, 1))

    def _latents(self, new: Tensor, row: int, batch: Batch) -> Tensor:
        """Return all latents of a sequence, [seq_len, head_dim], given those of this step."""
        seq_len = batch.seq_lens_bound[row]
        if seq_len == len(new):
            return new
        assert self.kv_cache is not None, "latents are read from the cache"
        num_blocks = -(-seq_len // self.kv_cache.shape[1])
        blocks = batch.groups[self.group].block_table[row, :num_blocks]
        return self.kv_cache.index_select(0, blocks).flatten(0, 1)[:seq_len].to(new.dtype)

    def _attend_plain(self, query: Tensor, latents: Tensor, out: Tensor) -> None:
        """Fill `out` [queries, num_heads, v_head_dim], of some heads at a time.

        Keys and values of a long past take no more memory than those of the longest step without
        one, which is what is measured at the start.
        """
        most = self.backend.limits.max_num_batched_tokens * self.num_heads // len(latents)
        heads_at_once = max(1, min(self.num_heads, most))
        for first in range(0, self.num_heads, heads_at_once):
            own = slice(first, first + heads_at_once)
            keys, values = self._keys_and_values(latents, own)
            out[:, own] = _causal(query[:, own], keys, values, self.options.scale)

    def _keys_and_values(self, latents: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        """Return keys and values of some heads, [seq_len, heads, ..]."""
        sizes = self.latent
        weight = self._kv_weight[heads]
        latent, turned = latents.split((sizes.kv_lora_rank, sizes.rope_head_dim), -1)
        made = functional.linear(latent, weight.flatten(0, 1)).unflatten(-1, (len(weight), -1))
        nope, values = made.split((sizes.nope_head_dim, sizes.v_head_dim), -1)
        keys = torch.cat((nope, turned.unsqueeze(1).expand(-1, len(weight), -1)), -1)
        return keys, values


def latent_key(
    kv: Tensor, positions: Tensor, rotary: RotaryTable, norm: tuple[Tensor, float]
) -> Tensor:
    """Return what is written of projected `kv` [num_tokens, head_dim]: normed, then rotated."""
    weight, eps = norm
    rank = len(weight)
    latent, turned = kv[:, :rank], rotary.rotate(kv[:, None, rank:], positions)[:, 0]
    wide = latent if latent.dtype == torch.float64 else latent.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return torch.cat((weight * (wide * scale).to(kv.dtype), turned), -1)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return the attention [queries, heads, v_head_dim] of a sequence's last queries."""
    num_queries, num_keys, dim = len(q), len(k), v.shape[-1]
    # Fused kernels want keys and values of one width.
    v = functional.pad(v, (0, k.shape[-1] - dim)) if k.shape[-1] > dim else v
    is_whole = num_queries == num_keys
    heads, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(
        heads,
        keys,
        values,
        attn_mask=None if is_whole else causal_lower_right(num_queries, num_keys),
        is_causal=is_whole,
        scale=scale,
    )
    return out[0].transpose(0, 1)[..., :dim]


def _other_tokens(batch: Batch, rows: list[int]) -> list[slice]:
    """Return the tokens of a batch that are not those of the sequences `rows`, in order."""
    found, begin, first, left_out = [], 0, 0, set(rows)
    for row, query_len in enumerate(batch.query_lens):
        if row in left_out:
            found.append(slice(begin, first))
            begin = first + query_len
        first += query_len
    found.append(slice(begin, first))
    return [part for part in found if part.stop > part.start]
