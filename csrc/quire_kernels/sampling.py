"""Sampling in Triton: finds rows that are not finite and draws, reading the logits once.

    logits row  [ block | block | block | ... ]   a program each: masses of its groups, flags
                    `-------`-------'             a program a row: the best group's best token

`quire.interfaces.sampling.Sampler` defines the draw, `filters` what the filters leave of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.filters import cut_rows
from quire_kernels.token_order import key_of, order_of, value_of_key

_UNIT = tl.constexpr(2.0**-32)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(3.4028234663852886e38)
# Of -inf and inf, by `key_of`.
_KEY_OF_NOTHING = tl.constexpr(-0x7F800001)
_KEY_OF_INFINITY = tl.constexpr(0x7F800000)
_NO_INDEX = tl.constexpr(0x7FFFFFFF)
# Tokens of a group, and of a program. A group's mass must not depend on the batch, so neither does
# how a row is cut.
_GROUP = tl.constexpr(64)
_BLOCK = 4096


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
def noise_of(first, seed, child, position, STAGE: tl.constexpr, COUNT: tl.constexpr):
    """Return the Gumbel noise of COUNT tokens or groups from `first`, a multiple of four."""
    quads = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = quads * 0
    at, of = zero + position.to(tl.uint32), zero + child.to(tl.uint32)
    a, b, c, d = tl.philox(seed, quads, at, of, zero + STAGE)
    # Each interleaving doubles the distance of what was there: a . c . , then a b c d.
    return gumbel(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))


@triton.jit
def first_of_best(score, index):
    """Return the index of the largest score, the lowest among equals; a NaN is the least."""
    keys = key_of(tl.where(score == score, score, float("-inf")))
    return tl.min(tl.where(keys == tl.max(keys, axis=0), index, _NO_INDEX), axis=0)


@triton.jit
def kept_scores(row_ptr, columns, temperature, cut, VOCAB: tl.constexpr, FILTERED: tl.constexpr):
    """Load logits over the temperature; -inf for NaN and what the filters drop."""
    score = tl.load(row_ptr + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    score = tl.where(score != score, float("-inf"), score)
    score = tl.div_rn(score, tl.zeros_like(score) + temperature)
    if FILTERED:
        score = tl.where(order_of(score, columns) >= cut, score, float("-inf"))
    return score


@triton.jit
def flag_of(key):
    """Return 0 if the largest key is that of -inf, 1 if it is finite, else 2."""
    return tl.where(key == _KEY_OF_NOTHING, 0, tl.where(key < _KEY_OF_INFINITY, 1, 2))


@triton.jit(
    do_not_specialize_on_alignment=["temperature_ptr", "cut_ptr"], launch_metadata=costs.of_tensors
)
def _block_kernel(
    logits_ptr, logits_stride, temperature_ptr, cut_ptr, mass_ptr, best_ptr, token_ptr, flag_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr,
    FILTERED: tl.constexpr,
):  # fmt: skip
    """Find the logarithms of the masses of a block's groups, or of a greedy row the best token.

    Whole numbers are compared where NaN must be seen: an SM reduces them in one instruction a warp.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, row_ptr = split * BLOCK, logits_ptr + row * logits_stride
    columns = first + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    is_drawn = temperature > 0
    flag = 1
    if FILTERED or not is_drawn:
        keys = key_of(tl.where(logits != logits, float("-inf"), logits))
        top = tl.max(tl.where(logits != logits, _NO_INDEX, keys), axis=0)
        flag = flag_of(top)
    out = row * SPLITS + split
    if is_drawn:
        factor = 1.0 / temperature
        if FILTERED:
            cut, factor = tl.load(cut_ptr + row), 1.0
            logits = kept_scores(row_ptr, columns, temperature, cut, VOCAB, FILTERED)
        peak = tl.max(logits, axis=0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.exp2((logits - base) * (tl.minimum(factor, _LARGEST) * _LOG2_E))
        masses = tl.sum(tl.reshape(mass, [BLOCK // _GROUP, _GROUP]), axis=1)
        if not FILTERED:
            # NaN, or +inf less itself, is in the sum.
            total = tl.sum(masses, axis=0)
            flag = tl.where(total != total, 2, tl.where(peak == float("-inf"), 0, 1))
        groups = first // _GROUP + tl.arange(0, BLOCK // _GROUP)
        masses = tl.log(masses) + base * factor
        tl.store(mass_ptr + row * GROUPS + groups, masses, mask=groups < GROUPS)
    else:
        keys = key_of(tl.where(logits != logits, float("-inf"), logits))
        best = tl.max(keys, axis=0)
        tl.store(best_ptr + out, value_of_key(best))
        tl.store(token_ptr + out, tl.min(tl.where(keys == best, columns, _NO_INDEX), axis=0))
    tl.store(flag_ptr + out, flag)


@triton.jit(
    do_not_specialize_on_alignment=["temperature_ptr", "seed_ptr", "child_ptr", "position_ptr"],
    launch_metadata=costs.of_tensors,
)
def _row_kernel(
    logits_ptr, logits_stride, temperature_ptr, cut_ptr, mass_ptr, best_ptr, token_ptr, flag_ptr,
    seed_ptr, child_ptr, position_ptr, token_id_ptr, status_ptr,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr, FILTERED: tl.constexpr,
    PADDED_SPLITS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
):  # fmt: skip
    """Draw a group by its mass and a token of it, or take the best block's token."""
    row, splits = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED_SPLITS)
    at, inside = row * SPLITS + splits, splits < SPLITS
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        seed, child = tl.load(seed_ptr + row), tl.load(child_ptr + row)
        position = tl.load(position_ptr + row)
        groups = tl.arange(0, PADDED_GROUPS)
        at_group = mass_ptr + row * GROUPS + groups
        score = tl.load(at_group, mask=groups < GROUPS, other=float("-inf"))
        score += noise_of(0, seed, child, position, 1, PADDED_GROUPS)
        first, cut = first_of_best(score, groups) * _GROUP, 0
        if FILTERED:
            cut = tl.load(cut_ptr + row)
        columns, row_ptr = first + tl.arange(0, _GROUP), logits_ptr + row * logits_stride
        score = kept_scores(row_ptr, columns, temperature, cut, VOCAB, FILTERED)
        score += noise_of(first, seed, child, position, 0, _GROUP)
        token = first_of_best(score, columns)
    else:
        best = tl.load(best_ptr + at, mask=inside, other=float("-inf"))
        token = tl.load(token_ptr + row * SPLITS + first_of_best(best, splits))
    flag = tl.max(tl.load(flag_ptr + at, mask=inside, other=0), axis=0)
    tl.store(token_id_ptr + row, token.to(tl.int64))
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
    splits, groups = triton.cdiv(vocab_size, _BLOCK), triton.cdiv(vocab_size, _GROUP.value)
    masses = torch.empty((num_rows, groups), dtype=torch.float32, device=logits.device)
    best = torch.empty((num_rows, splits), dtype=torch.float32, device=logits.device)
    tokens, flags = torch.empty((2, num_rows, splits), dtype=torch.int32, device=logits.device)
    found = (logits, logits.stride(0), temperature, cut, masses, best, tokens, flags)
    sizes = {"VOCAB": vocab_size, "SPLITS": splits, "GROUPS": groups, "FILTERED": cut is not None}
    _block_kernel[(num_rows, splits)](*found, **sizes, BLOCK=_BLOCK, num_warps=4)
    # Four numbers of a counter at least.
    padded = max(4, triton.next_power_of_2(groups))
    _row_kernel[(num_rows,)](
        *found,
        seed,
        child,
        position,
        token_ids,
        status,
        **sizes,
        PADDED_SPLITS=triton.next_power_of_2(splits),
        PADDED_GROUPS=padded,
        num_warps=8 if padded > 256 else 1,
    )
    return token_ids, status
