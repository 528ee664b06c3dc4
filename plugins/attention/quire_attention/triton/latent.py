"""The kernel of latent attention: `attend` of kernels.py for a cache of one row a token.

A row is LATENT numbers, then ROPE that were rotated; all heads share it. Scores are over both
parts, values are the first, which is read once for the two products:

    tile of keys   [ BLOCK_N, LATENT | ROPE ]     scores = q_latent @ latent.T + q_rope @ rope.T
                     `- values                    acc    = weights @ latent
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_attention.triton.kernels import (
    ITEM_SIZE,
    LN_2,
    LOG2_E,
    LOWEST,
    blocks_of,
    offsets_in,
    product,
    tanh,
)
from quire_kernels import costs
from quire_kernels.overlap import let_next_begin, options, wait_for_previous
from quire_kernels.rounding import rounded


@triton.jit
def over_latents(
    acc, peak, total, q, q_rope, positions, table, cache, stride_block, begin, end, low, high,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr, MASKED: tl.constexpr, INVARIANT: tl.constexpr,
):  # fmt: skip
    """Take the tiles of keys in [begin, end) into the running softmax, as `over_keys` does."""
    columns = tl.arange(0, BLOCK_N)
    dims, rope_dims = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    blocks = blocks_of(table, begin, columns, high, BLOCK_SIZE, BLOCK_N)
    for first in range(begin, end, BLOCK_N):
        keys = first + columns
        inside = (keys >= low) & (keys < high)
        offsets = offsets_in(
            blocks, first, columns, stride_block, BLOCK_SIZE, BLOCK_N, LATENT + ROPE
        )
        blocks = blocks_of(table, first + BLOCK_N, columns, high, BLOCK_SIZE, BLOCK_N)
        pointers = cache + offsets[:, None]
        mask, rope_mask = (dims < LATENT)[None, :], (rope_dims < ROPE)[None, :]
        if MASKED:
            mask, rope_mask = mask & inside[:, None], rope_mask & inside[:, None]
        latent = tl.load(pointers + dims[None, :], mask=mask, other=0.0)
        rope = tl.load(pointers + (LATENT + rope_dims)[None, :], mask=rope_mask, other=0.0)
        scores = tl.zeros([q.shape[0], BLOCK_N], dtype=tl.float32)
        scores = product(q_rope, tl.trans(rope), scores, INVARIANT)
        scores = product(q, tl.trans(latent), scores, INVARIANT)
        factor: tl.constexpr = (SCALE if SOFTCAP is None else SOFTCAP) * LOG2_E
        if SOFTCAP is not None:
            scores = tanh(scores * (SCALE / SOFTCAP))
        if MASKED:
            visible = (keys[None, :] <= positions[:, None]) & inside[None, :]
            if WINDOW is not None:
                visible &= keys[None, :] > positions[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = product(rounded(weights, q.dtype), latent, acc, INVARIANT)
        peak = new_peak
    return acc, peak, total


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "starts_ptr", "items_ptr"],
    launch_metadata=costs.of_latent_attention,
)
def attend(
    q_ptr, cache_ptr, out_ptr, lse_ptr, sinks_ptr, table_ptr,
    seq_lens_ptr, starts_ptr, items_ptr, num_items_ptr, partial_ptr, partial_lse_ptr,
    q_stride, q_stride_head, out_stride, stride_block, table_stride,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, SINGLE: tl.constexpr, INVARIANT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Attend BLOCK_M (token, head) rows of GROUP heads to a range of its sequence's keys.

    Grid (NUM_HEADS / GROUP, items or more); items, tiles and INVARIANT as in kernels.py.
    """
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    first_head, item = tl.program_id(0) * GROUP, tl.program_id(1)
    if SINGLE:
        if item >= tl.load(num_items_ptr):
            return
        entry = items_ptr + item * ITEM_SIZE
        sequence = tl.load(entry)
        begin, high = tl.load(entry + 1), tl.load(entry + 2)
        num_splits, place = tl.load(entry + 3), tl.load(entry + 4)
        token, num_tokens = sequence, 1
        position = tl.load(seq_lens_ptr + sequence) - 1
    else:
        if item >= tl.load(items_ptr):
            return
        entry = items_ptr + 2 * (1 + item)
        sequence, skipped = tl.load(entry), tl.load(entry + 1)
        start = tl.load(starts_ptr + sequence)
        query_len = tl.load(starts_ptr + sequence + 1) - start
        num_tokens = tl.minimum(query_len - skipped, BLOCK_M // GROUP)
        token = start + skipped
        position = tl.load(seq_lens_ptr + sequence) - query_len + skipped
        high = position + num_tokens
        begin, num_splits, place = 0, 1, 0
    low = 0
    if WINDOW is not None:
        low = tl.maximum(position - WINDOW + 1, 0)
        if not SINGLE:
            begin = low // BLOCK_N * BLOCK_N

    rows = tl.arange(0, BLOCK_M)
    row_tokens = (token + rows // GROUP).to(tl.int64)
    heads = first_head + rows % GROUP
    is_row = rows < num_tokens * GROUP
    positions = position + rows // GROUP
    dims, rope_dims = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    q_at = q_ptr + (row_tokens * q_stride + heads * q_stride_head)[:, None]
    is_latent, is_rope = (dims < LATENT)[None, :], (rope_dims < ROPE)[None, :]
    q = tl.load(q_at + dims[None, :], mask=is_row[:, None] & is_latent, other=0.0)
    rope_at = q_at + (LATENT + rope_dims)[None, :]
    q_rope = tl.load(rope_at, mask=is_row[:, None] & is_rope, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_L], dtype=tl.float32)
    peak = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if sinks_ptr is not None:
        # One more score, which no value belongs to; the first split has it.
        has_sink = is_row & (begin + 0 * rows <= low)
        sinks = tl.load(sinks_ptr + heads, mask=has_sink, other=float("-inf"))
        peak = tl.maximum(sinks * LOG2_E, LOWEST)
        total = has_sink.to(tl.float32)

    table = table_ptr + sequence.to(tl.int64) * table_stride
    plain_to = begin
    if not SINGLE and not INVARIANT and WINDOW is None:
        plain_to = (position + 1) // BLOCK_N * BLOCK_N
        acc, peak, total = over_latents(
            acc, peak, total, q, q_rope, positions, table, cache_ptr, stride_block, begin,
            plain_to, low, high, SCALE, SOFTCAP, WINDOW, BLOCK_SIZE, LATENT, ROPE,
            BLOCK_N, BLOCK_L, BLOCK_R, MASKED=False, INVARIANT=False,
        )  # fmt: skip
    acc, peak, total = over_latents(
        acc, peak, total, q, q_rope, positions, table, cache_ptr, stride_block, plain_to,
        high, low, high, SCALE, SOFTCAP, WINDOW, BLOCK_SIZE, LATENT, ROPE,
        BLOCK_N, BLOCK_L, BLOCK_R, MASKED=True, INVARIANT=INVARIANT,
    )  # fmt: skip

    # A padding row has seen nothing, and is zero.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    lse = peak + tl.log2(total)
    out_mask = is_row[:, None] & is_latent
    if num_splits > 1:
        places = place * NUM_HEADS + heads
        part = partial_ptr + places[:, None] * LATENT + dims[None, :]
        tl.store(part, acc, mask=out_mask)
        tl.store(partial_lse_ptr + places, lse, mask=is_row)
        return
    out = out_ptr + (row_tokens * out_stride + heads * LATENT)[:, None] + dims[None, :]
    tl.store(out, rounded(acc, out_ptr.dtype.element_ty), mask=out_mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + row_tokens * NUM_HEADS + heads, lse * LN_2, mask=is_row)


@triton.jit
def rotated(at, left, right, cos, sin, mask, dtype: tl.constexpr):
    """Return numbers `left` and `right` of `at`, rotated, in a dtype."""
    first = tl.load(at + left, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + right, mask=mask, other=0.0).to(tl.float32)
    turned = rounded(first * cos - second * sin, dtype)
    return turned, rounded(second * cos + first * sin, dtype)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"], launch_metadata=costs.of_latent_rows)
def write_rows(
    turned_ptr, kv_ptr, positions_ptr, slots_ptr, weight_ptr, cos_ptr, sin_ptr,
    queries_ptr, key_ptr, cache_ptr, eps, turned_stride, turned_stride_head, kv_stride,
    NUM_HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, PAIRED: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Take one token: its latent in program (token, 0), HEADS heads of its query in the others."""
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = ROPE // 2
    width: tl.constexpr = LATENT + ROPE
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    position = tl.load(positions_ptr + token).to(tl.int64)
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < half
    # Cosines are those of the model's dtype.
    cos = tl.load(cos_ptr + position * half + dims, mask=is_dim, other=0.0).to(dtype)
    sin = tl.load(sin_ptr + position * half + dims, mask=is_dim, other=0.0).to(dtype)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    if PAIRED:
        left, right = 2 * dims, 2 * dims + 1
    else:
        left, right = dims, dims + half
    if part == 0:
        row = tl.arange(0, BLOCK_L)
        is_latent = row < LATENT
        latent = tl.load(kv_ptr + token * kv_stride + row, mask=is_latent, other=0.0)
        latent = latent.to(tl.float32)
        scale = tl.rsqrt(tl.sum(latent * latent, 0) / LATENT + eps)
        weight = tl.load(weight_ptr + row, mask=is_latent, other=0.0).to(tl.float32)
        latent = rounded(latent * scale * weight, dtype)
        kv = kv_ptr + token * kv_stride + LATENT
        first, second = rotated(kv, left, right, cos, sin, is_dim, dtype)
        slot = tl.load(slots_ptr + token).to(tl.int64)
        key, kept = key_ptr + token * width, cache_ptr + slot * width
        tl.store(key + row, latent, mask=is_latent)
        tl.store(kept + row, latent, mask=is_latent)
        tl.store(key + LATENT + left, first, mask=is_dim)
        tl.store(key + LATENT + right, second, mask=is_dim)
        tl.store(kept + LATENT + left, first, mask=is_dim)
        tl.store(kept + LATENT + right, second, mask=is_dim)
    else:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        mask = (head < NUM_HEADS)[:, None] & is_dim[None, :]
        at = turned_ptr + token * turned_stride + (head * turned_stride_head)[:, None]
        lefts, rights = left[None, :], right[None, :]
        firsts, seconds = rotated(at, lefts, rights, cos[None, :], sin[None, :], mask, dtype)
        into = queries_ptr + ((token * NUM_HEADS + head) * width + LATENT)[:, None]
        tl.store(into + lefts, firsts, mask=mask)
        tl.store(into + rights, seconds, mask=mask)


def rotate_and_write(
    turned: Tensor,
    kv: Tensor,
    positions: Tensor,
    rotary: Any,
    norm: tuple[Tensor, float],
    kv_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do a backend's `rotate_and_write_latents` in one launch."""
    num_tokens, num_heads, rope = turned.shape
    weight, eps = norm
    rank = len(weight)
    turned, kv = (x if x.stride(-1) == 1 else x.contiguous() for x in (turned, kv))
    queries = torch.empty((num_tokens, num_heads, rank + rope), dtype=kv.dtype, device=kv.device)
    key = torch.empty((num_tokens, rank + rope), dtype=kv.dtype, device=kv.device)
    heads = min(16, triton.next_power_of_2(num_heads))
    if num_tokens:
        write_rows[(num_tokens, 1 + triton.cdiv(num_heads, heads))](
            turned, kv, positions, slots, weight, rotary.cos, rotary.sin,
            queries, key, kv_cache, eps, *turned.stride()[:2], kv.stride(0),
            NUM_HEADS=num_heads,
            LATENT=rank,
            ROPE=rope,
            HEADS=heads,
            BLOCK_L=triton.next_power_of_2(rank),
            BLOCK_H=triton.next_power_of_2(rope // 2),
            PAIRED=rotary.is_paired,
            num_warps=4,
            **options(),
        )  # fmt: skip
    return queries, key
