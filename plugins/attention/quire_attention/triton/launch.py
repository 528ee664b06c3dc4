"""Which kernel serves a spec, with what sizes and tiles."""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from quire.interfaces.attention import AttentionLayer, AttentionSpec
from quire_attention.triton import kernels, latent
from quire_attention.triton.tuning import (
    Tuning,
    fitted,
    invariant,
    latent_tuning,
    power_of_two,
    tuning_for,
)

# A program's sums of so many heads fit into its registers, in 16 bits and in 32.
MOST_HEADS, MOST_WIDE_HEADS = 64, 16


def kernel_of(
    spec: AttentionSpec, layer: AttentionLayer
) -> tuple[Any, tuple[Tensor | None, ...], dict[str, int]]:
    """Return the kernel, what it takes of the layer beside sinks, and its sizes."""
    if spec.latent is None:
        sizes = {"HEAD_DIM": spec.head_dim, "VALUE_DIM": spec.value_head_dim}
        return kernels.attend, (layer.k_scale, layer.v_scale), sizes | _block_widths(spec)
    rank, rope = spec.latent.kv_lora_rank, spec.latent.rope_head_dim
    sizes = {"LATENT": rank, "ROPE": rope}
    sizes |= {"BLOCK_L": power_of_two(rank), "BLOCK_R": power_of_two(rope)}
    return latent.attend, (), sizes


def in_groups(spec: AttentionSpec) -> AttentionSpec:
    """Return a spec with a KV head for each program that an item or a tile has.

    All heads share a latent: as many of them as a program has room for are served by one.
    """
    if spec.latent is None:
        return spec
    most = MOST_WIDE_HEADS if spec.dtype == "float32" else MOST_HEADS
    heads = max(n for n in range(1, most + 1) if spec.num_heads % n == 0)
    return evolve(spec, num_kv_heads=spec.num_heads // heads)


def merged_width(spec: AttentionSpec) -> int:
    """Return how many numbers of a value one program merges: all, but a part of a latent.

    A long sequence is cut into hundreds of splits, whose latents a program a head would read one
    after another.
    """
    width = power_of_two(spec.value_head_dim)
    return width if spec.latent is None else min(width, 64)


def widest_head(spec: AttentionSpec) -> int:
    """Return how wide a head is that has to fit in one piece; latents are not bound by it."""
    return 0 if spec.latent is not None else max(spec.head_dim, spec.value_head_dim)


def latent_rank(spec: AttentionSpec) -> int:
    """Return how many numbers of a latent are compressed; 0: there is none."""
    return 0 if spec.latent is None else spec.latent.kv_lora_rank


def _block_widths(spec: AttentionSpec) -> dict[str, int]:
    """Return how wide the tiles of keys and of values are.

    Both are the same where numbers have one byte: with values of 8 beside keys of 20 or 64, tiles
    of 128 rows and widths of their own, Triton 3.6 reads beyond its shared memory on an H200; with
    one width for both it does not.
    """
    block_d, block_v = power_of_two(spec.head_dim), power_of_two(spec.value_head_dim)
    if spec.has_quantized_kv:
        block_d = block_v = max(block_d, block_v)
    return {"BLOCK_D": block_d, "BLOCK_V": block_v}


def tuning_of(spec: AttentionSpec) -> Tuning:
    """Return the tuning for a GPU that has shared memory enough."""
    grouped, itemsize = in_groups(spec), _itemsize(spec)
    group = grouped.num_heads // grouped.num_kv_heads
    if spec.latent is not None:
        found = latent_tuning(group=group, itemsize=itemsize)
    else:
        dim = power_of_two(max(spec.head_dim, spec.value_head_dim))
        found = tuning_for(group=group, dim=dim, itemsize=itemsize)
    return invariant(found) if spec.batch_invariant else found


def fitted_tuning(spec: AttentionSpec) -> Tuning:
    """Return the tuning for the GPU that there is."""
    tuning = tuning_of(spec)
    if spec.device == "cpu":
        return tuning
    found = torch.cuda.get_device_properties(spec.device)
    # Not told by every version of PyTorch; then as on an H100, which Triton will check.
    shared_bytes = getattr(found, "shared_memory_per_block_optin", 232448)
    itemsize = _itemsize(spec)
    if spec.latent is not None:
        parts = (spec.latent.kv_lora_rank, spec.latent.rope_head_dim)
        dim, rows_a_key = sum(power_of_two(part) for part in parts), 1
    else:
        dim, rows_a_key = power_of_two(max(spec.head_dim, spec.value_head_dim)), 2
    return fitted(
        tuning, dim=dim, itemsize=itemsize, shared_bytes=shared_bytes, rows_a_key=rows_a_key
    )


def _itemsize(spec: AttentionSpec) -> int:
    return 4 if spec.dtype == "float32" else 2
