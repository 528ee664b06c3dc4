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
from triton import knobs
from triton.language.extra.cuda import libdevice

from quire_kernels.filters import cut_rows
from quire_kernels.token_order import key_of, order_of, value_of_key

# The interpreter has none of the GPU's own functions.
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_UNIT = tl.constexpr(2.0**-32)
_LN_2 = tl.constexpr(0.6931471805599453)
# The largest error of rough noise: log2 near 1 may err by 2**-22, and 1 - x is rounded; at 1/32
# that is some 1e-5 of the inner logarithm, which the outer one turns into an absolute error.
_ROUGH = tl.constexpr(3e-5)
# Of -inf and inf, by `key_of`.
_KEY_OF_NOTHING = tl.constexpr(-0x7F800001)
_KEY_OF_INFINITY = tl.constexpr(0x7F800000)
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
def rough_log2(x):
    """Return the GPU's own logarithm, one instruction instead of twenty."""
    return tl.log2(x) if _INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def rough_gumbel(lane):
    """Return `gumbel(lane)` with an error of at most ROUGH.

    Below 1/32 the logarithm of 1 - x is a series, where 1 - x would lose digits.
    """
    x = (lane.to(tl.float32) + 0.5) * _UNIT
    near = x * (1.0 + x * (0.5 + x * (0.33333333 + x * 0.25)))
    far = rough_log2(tl.maximum(1.0 - x, 1.0 - _BELOW_ONE)) * -_LN_2
    return rough_log2(tl.where(x < 0.03125, near, far)) * -_LN_2


@triton.jit
def lanes_of(first, seed, child, position, BLOCK: tl.constexpr):
    """Return the random 32-bit numbers of BLOCK tokens from `first`, a multiple of four."""
    quads = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = quads * 0
    at, of = zero + position.to(tl.uint32), zero + child.to(tl.uint32)
    a, b, c, d = tl.philox(seed, quads, at, of, zero)
    # Each interleaving doubles the distance of what was there: a . c . , then a b c d.
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def rough_winner(score, temperature, lanes, columns):
    """Return a tile's first and last column that may be the best by exact noise.

    Where no column is near the peak, for it is not finite, the first is behind the last.
    """
    rough = score * (1.0 / temperature) + rough_gumbel(lanes)
    peak = tl.max(rough, axis=0)
    # Twice the errors of two noises, and of two quotients of this size.
    is_near = rough >= peak - (4 * _ROUGH + 1e-6 * tl.abs(peak))
    first = tl.min(tl.where(is_near, columns, 0x7FFFFFFF), axis=0)
    return first, tl.max(tl.where(is_near, columns, -1), axis=0)


@triton.jit
def drawn_score(logit_ptr, token, temperature, seed, child, position):
    """Return a token's logit over the temperature, with its noise; `logit_ptr` is the logit's."""
    one = tl.arange(0, 1)
    token = one + token
    zero = token.to(tl.uint32) * 0
    at, of = zero + position.to(tl.uint32), zero + child.to(tl.uint32)
    a, b, c, d = tl.philox(seed, (token // 4).to(tl.uint32), at, of, zero)
    place = token % 4
    lane = tl.where(place < 2, tl.where(place == 0, a, b), tl.where(place == 2, c, d))
    score = tl.load(logit_ptr + one).to(tl.float32)
    return tl.max(tl.div_rn(score, one.to(tl.float32) + temperature) + gumbel(lane), axis=0)


@triton.jit
def exact_winner(
    row_ptr, first, cut, temperature, seed, child, position,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """Return the best score by exact noise of BLOCK tokens from `first`, and its token.

    A part at a time, so that it needs few registers beside what mostly runs.
    """
    best, token = float("-inf"), first
    for begin in range(first, first + BLOCK, PART):
        columns = begin + tl.arange(0, PART)
        score = tl.load(row_ptr + columns, mask=columns < VOCAB, other=float("-inf"))
        score = score.to(tl.float32)
        score = tl.where(score != score, float("-inf"), score)
        score = tl.div_rn(score, tl.zeros_like(score) + temperature)
        any_left = True
        if FILTERED:
            left = order_of(score, columns) >= cut
            score = tl.where(left, score, float("-inf"))
            any_left = tl.max(score, axis=0) > float("-inf")
        if any_left:
            score += gumbel(lanes_of(begin, seed, child, position, PART))
            keys = key_of(score)
            top = tl.max(keys, axis=0)
            if value_of_key(top) > best:
                best = value_of_key(top)
                token = tl.min(tl.where(keys == top, columns, 0x7FFFFFFF), axis=0)
    return best, token


@triton.jit(
    do_not_specialize_on_alignment=["temperature_ptr", "seed_ptr", "child_ptr", "position_ptr"]
)
def _draw_kernel(
    logits_ptr, logits_stride, temperature_ptr, seed_ptr, child_ptr, position_ptr, cut_ptr,
    best_ptr, token_ptr, flag_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, SPLITS: tl.constexpr,
    FILTERED: tl.constexpr,
):  # fmt: skip
    """Find the best score of a block of a row; flags: 0 all -inf, 1 finite, above not finite.

    Where no filter reads the scores, rough noise mostly tells the winner, and exact noise is made
    for it alone. Whole numbers are compared: an SM reduces them in one instruction a warp.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, row_ptr = split * BLOCK, logits_ptr + row * logits_stride
    columns = first + tl.arange(0, BLOCK)
    score = tl.load(row_ptr + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    is_nan = score != score
    score = tl.where(is_nan, float("-inf"), score)
    keys = key_of(score)
    top = tl.max(tl.where(is_nan, 0x7FFFFFFF, keys), axis=0)
    flag = tl.where(top == _KEY_OF_NOTHING, 0, tl.where(top < _KEY_OF_INFINITY, 1, 2))

    temperature = tl.load(temperature_ptr + row)
    best, token = value_of_key(tl.minimum(top, _KEY_OF_INFINITY)), first
    if temperature > 0:
        seed, child = tl.load(seed_ptr + row), tl.load(child_ptr + row)
        position = tl.load(position_ptr + row)
        last, cut = first - 1, 0
        if FILTERED:
            cut = tl.load(cut_ptr + row)
        else:
            lanes = lanes_of(first, seed, child, position, BLOCK)
            token, last = rough_winner(score, temperature, lanes, columns)
        # Below that 1 / temperature may overflow, and tell nothing.
        if (token == last) & (temperature > 1e-30):
            best = drawn_score(row_ptr + token, token, temperature, seed, child, position)
        else:
            best, token = exact_winner(
                row_ptr, first, cut, temperature, seed, child, position, VOCAB, BLOCK, PART,
                FILTERED,
            )  # fmt: skip
    else:
        token = tl.min(tl.where(keys == top, columns, 0x7FFFFFFF), axis=0)
        token = tl.where(flag == 1, token, first)
    out = row * SPLITS + split
    tl.store(best_ptr + out, best)
    tl.store(token_ptr + out, token)
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
        PART=min(block, 1024),
        SPLITS=splits,
        FILTERED=cut is not None,
        num_warps=8 if block == 4096 else 4,
    )
    padded = triton.next_power_of_2(splits)
    _pick_kernel[(num_rows,)](
        best, tokens, flags, token_ids, status, SPLITS=splits, BLOCK=padded, num_warps=1
    )
    return token_ids, status
