"""Norm of q and k heads, RoPE and the write to the KV cache in a Triton kernel, or the write alone.

`ops.rotate_and_write` and `ops.write_kv` have what they mean. A program takes some heads of one
token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.overlap import let_next_begin, options, wait_for_previous
from quire_kernels.rounding import quantized, rounded

# Numbers of a tile, and of one where many tokens share the GPU: cosines serve more heads of it.
_TILE, _LARGE_TILE = 1024, 2048
_MANY_TOKENS = 128


@triton.jit
def weighed(x, scale, is_q, dims, inside, q_weight_ptr, k_weight_ptr, dtype: tl.constexpr):
    """Return x * scale, rounded, times the weight of q or k, rounded."""
    q_weight = tl.load(q_weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    weight = tl.where(is_q[:, None], q_weight[None, :], k_weight[None, :])
    normed = rounded(x * scale[:, None], dtype).to(tl.float32)
    return rounded(normed * weight, dtype).to(tl.float32)


@triton.jit(
    do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"],
    launch_metadata=costs.of_rotation,
)
def _rotate_and_write_kernel(
    qkv_ptr, positions_ptr, slots_ptr, q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr,
    q_weight_ptr, k_weight_ptr, k_scale_ptr, v_scale_ptr, eps, qkv_stride,
    key_stride_block, key_stride_token, key_stride_head,
    value_stride_block, value_stride_token, value_stride_head,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Take HEADS heads of one token, of its q, k and v heads in order.

    Each dimension is read beside its partner in the rotation, which the same cache line holds:

        dims       0 .. half-1   half .. rotary-1   rotary .. head_dim-1
        partners   half ..       0 ..               none
    """
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q = head < NUM_HEADS
    is_v = head >= NUM_HEADS + NUM_KV_HEADS
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & in_head[None, :]
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    heads = qkv_ptr + token * qkv_stride + (head * HEAD_DIM)[:, None]
    raw = tl.load(heads + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    x = raw
    if q_weight_ptr is not None:
        scale = tl.rsqrt(tl.sum(raw * raw, 1) / HEAD_DIM + eps)
        x = weighed(raw, scale, is_q, dims, in_head, q_weight_ptr, k_weight_ptr, dtype)
    if cos_ptr is not None:
        half: tl.constexpr = ROTARY_DIM // 2
        turns = dims < ROTARY_DIM
        partners = tl.where(dims < half, dims + half, dims - half)
        mask = inside & turns[None, :]
        other = tl.load(heads + partners[None, :], mask=mask, other=0.0).to(tl.float32)
        if q_weight_ptr is not None:
            other = weighed(other, scale, is_q, partners, turns, q_weight_ptr, k_weight_ptr, dtype)
        row = tl.load(positions_ptr + token).to(tl.int64) * half + tl.where(
            dims < half, dims, partners
        )
        cos = rounded(tl.load(cos_ptr + row, mask=turns, other=0.0), dtype).to(tl.float32)
        sin = rounded(tl.load(sin_ptr + row, mask=turns, other=0.0), dtype).to(tl.float32)
        sin = tl.where(dims < half, -sin, sin)
        turned = rounded(x * cos[None, :], dtype).to(tl.float32) + other * sin[None, :]
        x = tl.where(turns[None, :], turned, x)
    x = rounded(tl.where(is_v[:, None], raw, x), dtype)

    q = q_ptr + token * (NUM_HEADS * HEAD_DIM) + (head * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(q, x, mask=inside & is_q[:, None])
    slot = tl.load(slots_ptr + token).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    key = key_ptr + block * key_stride_block + offset * key_stride_token
    stored = x
    if k_scale_ptr is not None:
        kv_head = tl.where(is_v, head - NUM_KV_HEADS, head) - NUM_HEADS
        is_kv = (kv_head >= 0) & (kv_head < NUM_KV_HEADS)
        k_scale = tl.load(k_scale_ptr + kv_head, mask=is_kv, other=1.0)
        v_scale = tl.load(v_scale_ptr + kv_head, mask=is_kv, other=1.0)
        scales = tl.where(is_v, v_scale, k_scale)[:, None] + tl.zeros_like(x).to(tl.float32)
        stored = quantized(x.to(tl.float32), scales, key_ptr.dtype.element_ty)
    key_heads = (head - NUM_HEADS) * key_stride_head
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    tl.store(key + key_heads[:, None] + dims[None, :], stored, mask=inside & is_k[:, None])
    value = value_ptr + block * value_stride_block + offset * value_stride_token
    value_heads = (head - NUM_HEADS - NUM_KV_HEADS) * value_stride_head
    tl.store(value + value_heads[:, None] + dims[None, :], stored, mask=inside & is_v[:, None])


def rotate_and_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None,
    norm: tuple[Tensor, Tensor, float] | None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return `ops.rotate_and_write`, q in new memory."""
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    num_tokens, num_heads = len(qkv), qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    cos, sin = rotary or (None, None)
    q_weight, k_weight, eps = norm or (None, None, 0.0)
    k_scale, v_scale = scales or (None, None)
    block_d = triton.next_power_of_2(head_dim)
    is_many = num_tokens >= _MANY_TOKENS
    heads = max(1, (_LARGE_TILE if is_many else _TILE) // block_d)
    grid = (num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads))
    _rotate_and_write_kernel[grid](
        qkv, positions, slots, q, key_cache, value_cache, cos, sin,
        q_weight, k_weight, k_scale, v_scale, eps, qkv.stride(0),
        *key_cache.stride()[:3], *value_cache.stride()[:3],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=0 if cos is None else 2 * cos.shape[1],
        BLOCK_SIZE=block_size,
        HEADS=heads,
        BLOCK_D=block_d,
        num_warps=4 if is_many and norm is None else 8,
        **options(),
    )  # fmt: skip
    return q


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"], launch_metadata=costs.of_write)
def _write_kernel(
    k_ptr, v_ptr, slots_ptr, key_ptr, value_ptr, k_scale_ptr, v_scale_ptr,
    k_stride, k_stride_head, v_stride, v_stride_head,
    key_stride_block, key_stride_token, key_stride_head,
    value_stride_block, value_stride_token, value_stride_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Take HEADS KV heads of one token, key and value."""
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, BLOCK_D)
    is_head = (head < NUM_KV_HEADS)[:, None]
    is_key, is_value = is_head & (dims < HEAD_DIM)[None, :], is_head & (dims < VALUE_DIM)[None, :]
    slot = tl.load(slots_ptr + token).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    k_row, v_row = k_ptr + token * k_stride, v_ptr + token * v_stride
    k = tl.load(k_row + (head * k_stride_head)[:, None] + dims[None, :], mask=is_key, other=0.0)
    v = tl.load(v_row + (head * v_stride_head)[:, None] + dims[None, :], mask=is_value, other=0.0)
    if k_scale_ptr is not None:
        dtype: tl.constexpr = key_ptr.dtype.element_ty
        k, v = k.to(tl.float32), v.to(tl.float32)
        k_scale = tl.load(k_scale_ptr + head, mask=head < NUM_KV_HEADS, other=1.0)
        v_scale = tl.load(v_scale_ptr + head, mask=head < NUM_KV_HEADS, other=1.0)
        k = quantized(k, k_scale[:, None] + tl.zeros_like(k), dtype)
        v = quantized(v, v_scale[:, None] + tl.zeros_like(v), dtype)
    key = key_ptr + block * key_stride_block + offset * key_stride_token
    tl.store(key + (head * key_stride_head)[:, None] + dims[None, :], k, mask=is_key)
    value = value_ptr + block * value_stride_block + offset * value_stride_token
    tl.store(value + (head * value_stride_head)[:, None] + dims[None, :], v, mask=is_value)


def write_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Do `ops.write_kv` in one launch."""
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    if len(k) == 0:
        return
    # Heads may lie anywhere, but the numbers of one lie side by side.
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    value_dim = v.shape[2]
    block_d = triton.next_power_of_2(max(head_dim, value_dim))
    heads = min(max(1, _TILE // block_d), triton.next_power_of_2(num_kv_heads))
    _write_kernel[(len(k), triton.cdiv(num_kv_heads, heads))](
        k, v, slots, key_cache, value_cache, *(scales or (None, None)),
        *k.stride()[:2], *v.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_SIZE=block_size,
        HEADS=heads,
        BLOCK_D=block_d,
        num_warps=4,
        **options(),
    )  # fmt: skip
