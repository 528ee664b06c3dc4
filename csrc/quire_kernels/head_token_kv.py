"""A KV cache [num_blocks, num_kv_heads, block_size, head_dim + value_head_dim]: key, then value.

The layout of `triton`, `cuda` and `flashinfer`, which so can take turns on one cache: one head's
keys and values of a block are one contiguous piece.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quire_kernels import ops

NAME = "head-token-kv"


def keys_and_values(kv_cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return both as [num_blocks, block_size, num_kv_heads, dimensions], strided."""
    tokens = kv_cache.transpose(1, 2)
    return tokens[..., :head_dim], tokens[..., head_dim:]


def write(layer: Any, k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Store keys and values of tokens in their slots, by the layer's scales where it has some."""
    ops.write_kv(k, v, slots, *keys_and_values(kv_cache, k.shape[-1]), scales=_scales(layer))


def write_latents(k: Tensor, kv_cache: Tensor, slots: Tensor, rank: int) -> None:
    """Store latents [num_tokens, 1, dim] in a cache [num_blocks, block_size, dim] of such rows.

    Their first `rank` numbers and the rest are written as a key and a value would be.
    """
    rows = kv_cache.unsqueeze(2)
    ops.write_kv(k[..., :rank], k[..., rank:], slots, rows[..., :rank], rows[..., rank:])


def rotate_and_write(
    layer: Any,
    qkv: Tensor,
    positions: Tensor,
    rotary: Any,
    qk_norm: Any,
    kv_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Normalise, rotate and write in one kernel, where values are as wide as keys; return q."""
    return ops.rotate_and_write(
        qkv,
        positions,
        slots,
        *keys_and_values(kv_cache, kv_cache.shape[-1] // 2),
        rotary=None if rotary is None else (rotary.cos, rotary.sin),
        norm=None if qk_norm is None else (qk_norm.q, qk_norm.k, qk_norm.eps),
        scales=_scales(layer),
    )


def _scales(layer: Any) -> tuple[Tensor, Tensor] | None:
    return None if layer.k_scale is None else (layer.k_scale, layer.v_scale)
