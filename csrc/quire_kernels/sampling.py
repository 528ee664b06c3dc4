"""Sampling in Triton: finds rows that are not finite and draws, without storing any noise.

    logits row  [ block | block | block | ... ]   a program each: best score, its token, flags
                    `-------`-------'             a program a row: the best of the blocks

`quire.interfaces.sampling.Sampler` defines the draw, `filters` what the filters leave of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.filters import cut_rows
from quire_kernels.token_order import order_of

_UNIT = tl.constexpr(2.0**-32)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)
# Rows that fill a GPU with 4,096 tokens a program; fewer are cut finer.
_MANY_ROWS = 8


@triton.jit
def log1p(x):
    """Return log(1 + x) for x in (-1, 0], right also where 1 + x rounds to 1.

    Source: the correction is Kahan's, as in Goldberg, "What every computer scientist should know
    about floating-point arithmetic", theorem 4.
    """
    rounded = 1.0 + x
    is_one = rounded == 1.0
    lost = x / tl.where(is_one, 1.0, rounded - 1.0)
    return tl.where(is_one, x, tl.log(rounded) * lost)


@triton.jit
def gumbel(lane):
    """Return the Gumbel noise of random 32-bit numbers."""
    uniform = tl.minimum((lane.to(tl.float32) + 0.5) * _UNIT, _BELOW_ONE)
    return -tl.log(-log1p(-uniform))


@triton.jit
def noise_of(first, seed, child, position, BLOCK: tl.constexpr):
    """Return the noise of BLOCK tokens from `first`, a multiple of four."""
    quads = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = quads * 0
    at, of = zero + position.to(tl.uint32), zero + child.to(tl.uint32)
    a, b, c, d = tl.philox(seed, quads, at, of, zero)
    # Each interleaving doubles the distance of what was there: a . c . , then a b c d.
    return gumbel(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))


@triton.jit(
    do_not_specialize_on_alignment=["temperature_ptr", "seed_ptr", "child_ptr", "position_ptr"]
)
def _draw_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    seed_ptr,
    child_ptr,
    position_ptr,
    cut_ptr,
    best_ptr,
    token_ptr,
    flag_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """Find the best score of a block of a row; flags: 0 all -inf, 1 finite, above not finite."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = split * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * logits_stride + columns
    score = tl.load(at, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    is_nan = score != score
    is_bad = is_nan | (score == float("inf"))
    flag = tl.max((score > float("-inf")).to(tl.int32) + 2 * is_bad.to(tl.int32), axis=0)
    score = tl.where(is_nan, float("-inf"), score)

    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        score = tl.div_rn(score, tl.zeros_like(score) + temperature)
        any_left = True
        if FILTERED:
            left = order_of(score, columns) >= tl.load(cut_ptr + row)
            score = tl.where(left, score, float("-inf"))
            any_left = tl.max(score, axis=0) > float("-inf")
        if any_left:
            seed, child = tl.load(seed_ptr + row), tl.load(child_ptr + row)
            score += noise_of(split * BLOCK, seed, child, tl.load(position_ptr + row), BLOCK)

    best, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    out = row * SPLITS + split
    tl.store(best_ptr + out, best)
    tl.store(token_ptr + out, split * BLOCK + index)
    tl.store(flag_ptr + out, flag)


@triton.jit
def _pick_kernel(
    best_ptr,
    token_ptr,
    flag_ptr,
    token_id_ptr,
    status_ptr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the best block's token; among equals the first, which has the lowest token."""
    row, splits = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, inside = row * SPLITS + splits, splits < SPLITS
    best = tl.load(best_ptr + at, mask=inside, other=float("-inf"))
    _, index = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
    flag = tl.max(tl.load(flag_ptr + at, mask=inside, other=0), axis=0)
    tl.store(token_id_ptr + row, tl.load(token_ptr + row * SPLITS + index).to(tl.int64))
    tl.store(status_ptr + row, (flag != 1).to(tl.int32))


def sample(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    child: Tensor,
    position: Tensor,
    filters: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `ops.sample` of logits whose rows' values are neighbours."""
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    status = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return token_ids, status
    cut = None if filters is None else cut_rows(logits, temperature, filters)
    block = 4096 if num_rows >= _MANY_ROWS else 1024
    splits = triton.cdiv(vocab_size, block)
    best = torch.empty((num_rows, splits), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((num_rows, splits), dtype=torch.int32, device=logits.device)
    flags = torch.empty((num_rows, splits), dtype=torch.int32, device=logits.device)
    _draw_kernel[(num_rows, splits)](
        logits,
        logits.stride(0),
        temperature,
        seed,
        child,
        position,
        cut,
        best,
        tokens,
        flags,
        VOCAB=vocab_size,
        BLOCK=block,
        SPLITS=splits,
        FILTERED=cut is not None,
        num_warps=8 if block == 4096 else 4,
    )
    padded = triton.next_power_of_2(splits)
    _pick_kernel[(num_rows,)](
        best, tokens, flags, token_ids, status, SPLITS=splits, BLOCK=padded, num_warps=1
    )
    return token_ids, status
