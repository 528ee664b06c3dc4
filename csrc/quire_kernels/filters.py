"""Top-k, top-p and min-p in Triton, without sorting: where each row is cut.

Tokens are ordered by value, equals by token id, as one int64; a row is cut at a number of that
order, and what lies below it is not drawn. For top-k and top-p the number is closed in on:

    measure   a program a split of the row: maximum, sum, number of finite values
    narrow    twice: how many tokens (top-k) or how much mass (top-p) lie at or above each of 16
              thresholds; the cut lies between two of them
    gather    the few tokens between the two, into a buffer
    search    a program a row: eight-fold search among these, for top-k, then for top-p

Mass is exp(value - maximum) in steps of 2**-40, held in int64: sums are the same in any order, so
the cut does not depend on which program comes first. Rows without a filter leave at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.token_order import lowest_order_of, order_of, value_of

# Read once a row, wherever they lie: of rows packed end to end, alignment follows their number.
PER_ROW: Any = {
    "do_not_specialize_on_alignment": ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"],
    "launch_metadata": costs.of_tensors,
}
# Results must not depend on the batch, so neither does the split.
_SPLIT = tl.constexpr(2048)
_COLUMNS = tl.constexpr(256)
_POINTS = tl.constexpr(16)
_STEPS = tl.constexpr(8)
_CHUNK = tl.constexpr(1024)
# Candidates a row has room for; of more, the search reads the logits instead.
_ROOM = tl.constexpr(8192)
# Where a row's state has what: counts or masses of both narrowings, and what was gathered.
_NUM_GATHERED = tl.constexpr(2 * 16)
_MASS_ABOVE = tl.constexpr(2 * 16 + 1)
_STATE = tl.constexpr(2 * 16 + 2)
# A row's limits: of each narrowing an upper end and 16 thresholds, then the two that are left.
_LIMITS = tl.constexpr(2 * 17 + 2)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_ONE = tl.constexpr(float(2**40))
_NO_CUT = tl.constexpr(-(2**63))


@triton.jit
def _mass_of(value, top):
    """Return exp(value - top) in steps of 2**-40; nothing for -inf and NaN."""
    weight = tl.where(value >= _LOWEST, tl.exp(value - top), 0.0)
    return (weight * _ONE).to(tl.int64)


@triton.jit
def _scaled(logits_ptr, columns, temperature, VOCAB: tl.constexpr):
    """Load logits of a row over its temperature."""
    logits = tl.load(logits_ptr + columns, mask=columns < VOCAB, other=float("-inf"))
    logits = logits.to(tl.float32)
    return tl.div_rn(logits, tl.zeros_like(logits) + temperature)


@triton.jit
def _row_measures(measures_ptr, SPLITS: tl.constexpr, PADDED: tl.constexpr):
    """Return a row's maximum, the mean and the number of its finite values."""
    at = tl.arange(0, PADDED)
    inside = at < SPLITS
    top = tl.max(tl.load(measures_ptr + at, mask=inside, other=float("-inf")), axis=0)
    total = tl.sum(tl.load(measures_ptr + SPLITS + at, mask=inside, other=0.0), axis=0)
    count = tl.sum(tl.load(measures_ptr + 2 * SPLITS + at, mask=inside, other=0.0), axis=0)
    return top, total / tl.maximum(count, 1.0), count.to(tl.int64)


@triton.jit
def _is_searched(top, num_finite, top_k, top_p):
    """Answer whether top-k or top-p can drop a token of a row that is drawn from."""
    return (tl.abs(top) < float("inf")) & ((top_k < num_finite) | (top_p < 1.0))


@triton.jit
def _mass_wanted(top_p, total):
    """Return the mass that the kept tokens must reach: top_p of the total, at least a step."""
    wanted = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(wanted, 1)


@triton.jit
def _bracket(state_ptr, limits_ptr, by_count, top_k, top_p, STAGE: tl.constexpr):
    """Return the two limits, low and high, between which a narrowing found the cut."""
    found = tl.load(state_ptr + _POINTS * STAGE + tl.arange(0, _POINTS))
    # The first narrowing's last threshold lies below every finite value.
    wanted = _mass_wanted(top_p, tl.load(state_ptr + _POINTS - 1))
    is_short = found < tl.where(by_count, top_k, wanted)
    place = tl.minimum(tl.sum(is_short.to(tl.int32), axis=0), _POINTS - 1)
    limits = limits_ptr + 17 * STAGE + place
    return tl.load(limits + 1), tl.load(limits)


@triton.jit(**PER_ROW)
def _measure_kernel(
    logits_ptr, logits_stride, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, measures_ptr,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Measure a split of a row: maximum, sum and number of its finite values."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    is_filtered = (tl.load(top_k_ptr + row) < VOCAB) | (tl.load(top_p_ptr + row) < 1.0)
    is_filtered = is_filtered | (tl.load(min_p_ptr + row) > 0.0)
    if (temperature > 0) & is_filtered:
        columns = split * _SPLIT + tl.arange(0, _SPLIT)
        values = _scaled(logits_ptr + row * logits_stride, columns, temperature, VOCAB)
        values = tl.where(values == values, values, float("-inf"))
        is_finite = values >= _LOWEST
        out = measures_ptr + row * 3 * SPLITS + split
        tl.store(out, tl.max(values, axis=0))
        tl.store(out + SPLITS, tl.sum(tl.where(is_finite, values, 0.0), axis=0))
        tl.store(out + 2 * SPLITS, tl.sum(is_finite.to(tl.float32), axis=0))


@triton.jit
def _thresholds(state_ptr, limits_ptr, top, mean, top_k, top_p, by_count, STAGE: tl.constexpr):
    """Return 16 falling thresholds and what lies above them.

    The first narrowing looks from the maximum to a little below the mean, the second between the
    limits that the first has left; the last threshold is never above the cut.
    """
    at = tl.arange(0, _POINTS)
    if STAGE == 0:
        low, high, last = top - 1.25 * (top - mean), float("inf"), _LOWEST
        step = (top - low) / (_POINTS - 1)
        points = top - (at + 1) * step
    else:
        low, high = _bracket(state_ptr, limits_ptr, by_count, top_k, top_p, 0)
        last = low
        upper = tl.minimum(high, top)
        # The lower limit may be that of float32.
        low = tl.maximum(low, upper - 4 * (top - mean))
        points = upper - (at + 1) * ((upper - low) / _POINTS)
    return tl.where(at == _POINTS - 1, last, tl.maximum(points, last)), high


@triton.jit
def _counts_above(points, logits_ptr, split, temperature, VOCAB: tl.constexpr):
    """Return how many tokens of a split lie at or above each threshold, int64."""
    counts = tl.zeros((_POINTS, _COLUMNS), tl.int32)
    for start in range(split * _SPLIT, (split + 1) * _SPLIT, _COLUMNS):
        values = _scaled(logits_ptr, start + tl.arange(0, _COLUMNS), temperature, VOCAB)
        counts += (values[None, :] >= points[:, None]).to(tl.int32)
    return tl.sum(counts, axis=1).to(tl.int64)


@triton.jit
def _masses_above(points, logits_ptr, split, temperature, top, VOCAB: tl.constexpr):
    """Return the mass of a split's tokens at or above each threshold."""
    masses = tl.zeros((_POINTS, _COLUMNS), tl.int64)
    for start in range(split * _SPLIT, (split + 1) * _SPLIT, _COLUMNS):
        values = _scaled(logits_ptr, start + tl.arange(0, _COLUMNS), temperature, VOCAB)
        is_above = values[None, :] >= points[:, None]
        masses += tl.where(is_above, _mass_of(values, top)[None, :], 0)
    return tl.sum(masses, axis=1)


@triton.jit(**PER_ROW)
def _narrow_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    measures_ptr,
    state_ptr,
    limits_ptr,
    VOCAB: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
    STAGE: tl.constexpr,
):
    """Add to a row's counts or masses, at or above each threshold, those of a split."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if (temperature > 0) & ((top_k < VOCAB) | (top_p < 1.0)):
        measures = measures_ptr + row * 3 * SPLITS
        top, mean, num_finite = _row_measures(measures, SPLITS, PADDED)
        if _is_searched(top, num_finite, top_k, top_p):
            state_ptr += row * _STATE
            limits_ptr += row * _LIMITS
            by_count = top_k < num_finite
            points, high = _thresholds(
                state_ptr, limits_ptr, top, mean, top_k, top_p, by_count, STAGE
            )
            at = tl.arange(0, _POINTS)
            if split == 0:
                tl.store(limits_ptr + 17 * STAGE, high)
                tl.store(limits_ptr + 17 * STAGE + 1 + at, points)
            if tl.load(measures + split) >= tl.min(points, axis=0):
                row_ptr = logits_ptr + row * logits_stride
                if by_count:
                    found = _counts_above(points, row_ptr, split, temperature, VOCAB)
                else:
                    found = _masses_above(points, row_ptr, split, temperature, top, VOCAB)
                tl.atomic_add(state_ptr + _POINTS * STAGE + at, found, sem="relaxed")


@triton.jit(**PER_ROW)
def _gather_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    measures_ptr,
    state_ptr,
    limits_ptr,
    orders_ptr,
    VOCAB: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Collect the orders of a split's tokens between the limits, and add up the mass above them.

    For top-k all tokens above the lower limit are collected: top-p then needs no other.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if (temperature > 0) & ((top_k < VOCAB) | (top_p < 1.0)):
        measures = measures_ptr + row * 3 * SPLITS
        top, _mean, num_finite = _row_measures(measures, SPLITS, PADDED)
        if _is_searched(top, num_finite, top_k, top_p):
            state_ptr += row * _STATE
            limits_ptr += row * _LIMITS
            by_count = top_k < num_finite
            low, high = _bracket(state_ptr, limits_ptr, by_count, top_k, top_p, 1)
            high = tl.where(by_count, float("inf"), high)
            if split == 0:
                tl.store(limits_ptr + _LIMITS - 2, low)
                tl.store(limits_ptr + _LIMITS - 1, high)
            if tl.load(measures + split) >= low:
                columns = split * _SPLIT + tl.arange(0, _SPLIT)
                values = _scaled(logits_ptr + row * logits_stride, columns, temperature, VOCAB)
                is_inside = (values >= low) & (values < high)
                number = tl.sum(is_inside.to(tl.int32), axis=0).to(tl.int64)
                first = tl.atomic_add(state_ptr + _NUM_GATHERED, number, sem="relaxed")
                place = first + tl.cumsum(is_inside.to(tl.int32), axis=0) - 1
                at = orders_ptr + row * _ROOM + place
                tl.store(at, order_of(values, columns), mask=is_inside & (place < _ROOM))
                mass = tl.sum(tl.where(values >= high, _mass_of(values, top), 0), axis=0)
                tl.atomic_add(state_ptr + _MASS_ABOVE, mass, sem="relaxed")


@triton.jit
def _counts_and_masses(
    points, logits_ptr, temperature, orders_ptr, number, low, high, top, VOCAB: tl.constexpr
):
    """Return how many candidates, and how much mass, lie at or above each of 8 orders."""
    counts = tl.zeros((_STEPS, _CHUNK), tl.int32)
    masses = tl.zeros((_STEPS, _CHUNK), tl.int64)
    is_buffered = number <= _ROOM
    end = tl.where(is_buffered, number, VOCAB).to(tl.int32)
    for start in range(0, end, _CHUNK):
        at = start + tl.arange(0, _CHUNK)
        if is_buffered:
            orders = tl.load(orders_ptr + at, mask=at < end, other=_NO_CUT)
            values = value_of(orders)
        else:
            values = _scaled(logits_ptr, at, temperature, VOCAB)
            is_inside = (values >= low) & (values < high)
            orders = tl.where(is_inside, order_of(values, at), _NO_CUT)
        is_above = orders[None, :] >= points[:, None]
        counts += is_above.to(tl.int32)
        masses += tl.where(is_above, _mass_of(values, top)[None, :], 0)
    return tl.sum(counts, axis=1), tl.sum(masses, axis=1)


@triton.jit
def _select(
    wanted,
    first,
    end,
    logits_ptr,
    temperature,
    orders_ptr,
    number,
    low,
    high,
    top,
    VOCAB: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """Return the largest order from which on there are as many candidates, or mass, as wanted.

    There are at `first`, and there are not at `end`. Any order between the token that is meant and
    the next lower one does, so the search may stop when one token is left.
    """
    num_first, num_end = number.to(tl.int32), 0
    while (end - first > 1) & (num_first - num_end > 1):
        step = (end - first + _STEPS - 1) // _STEPS
        points = tl.minimum(first + tl.arange(0, _STEPS) * step, end - 1)
        counts, masses = _counts_and_masses(
            points, logits_ptr, temperature, orders_ptr, number, low, high, top, VOCAB
        )
        is_enough = (masses >= wanted) if BY_MASS else (counts >= wanted)
        first = tl.max(tl.where(is_enough, points, first), axis=0)
        end = tl.min(tl.where(is_enough, end, points), axis=0)
        num_first = tl.min(tl.where(is_enough, counts, num_first), axis=0)
        num_end = tl.max(tl.where(is_enough, num_end, counts), axis=0)
    return first


@triton.jit(**PER_ROW)
def _search_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    measures_ptr,
    state_ptr,
    limits_ptr,
    orders_ptr,
    cut_ptr,
    VOCAB: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Find the order at which a row is cut."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    cut = tl.full((), _NO_CUT, tl.int64)
    if (temperature > 0) & ((top_k < VOCAB) | (top_p < 1.0) | (min_p > 0.0)):
        measures = measures_ptr + row * 3 * SPLITS
        top, _mean, num_finite = _row_measures(measures, SPLITS, PADDED)
        if _is_searched(top, num_finite, top_k, top_p):
            logits_ptr += row * logits_stride
            orders_ptr += row * _ROOM
            state_ptr += row * _STATE
            limits = limits_ptr + row * _LIMITS + _LIMITS - 2
            number = tl.load(state_ptr + _NUM_GATHERED)
            low, high = tl.load(limits), tl.load(limits + 1)
            cut = lowest_order_of(low)
            end = lowest_order_of(tl.minimum(high, top)) + 0x1000000
            total = tl.load(state_ptr + _POINTS - 1)
            above = tl.load(state_ptr + _MASS_ABOVE)
            if top_k < num_finite:
                cut = _select(
                    top_k, cut, end,
                    logits_ptr, temperature, orders_ptr, number, low, high, top,
                    VOCAB, False,
                )  # fmt: skip
                points = cut + tl.zeros((_STEPS,), tl.int64)
                _counts, masses = _counts_and_masses(
                    points, logits_ptr, temperature, orders_ptr, number, low, high, top, VOCAB
                )
                total = tl.max(masses, axis=0)
            if top_p < 1.0:
                cut = _select(
                    _mass_wanted(top_p, total) - above, cut, end,
                    logits_ptr, temperature, orders_ptr, number, low, high, top,
                    VOCAB, True,
                )  # fmt: skip
        if (min_p > 0.0) & (tl.abs(top) < float("inf")):
            cut = tl.maximum(cut, lowest_order_of(top + tl.log(min_p)))
    tl.store(cut_ptr + row, cut)


def cut_rows(logits: Tensor, temperature: Tensor, filters: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the lowest order that each row keeps, int64 [num_rows].

    `filters` are top_k int64, top_p and min_p float32, [num_rows].
    """
    num_rows, vocab_size = logits.shape
    splits = triton.cdiv(vocab_size, _SPLIT.value)
    device = logits.device
    measures = torch.empty((num_rows, 3, splits), dtype=torch.float32, device=device)
    state = torch.zeros((num_rows, _STATE.value), dtype=torch.int64, device=device)
    limits = torch.empty((num_rows, _LIMITS.value), dtype=torch.float32, device=device)
    orders = torch.empty((num_rows, _ROOM.value), dtype=torch.int64, device=device)
    cut = torch.empty(num_rows, dtype=torch.int64, device=device)
    top_k, top_p, min_p = filters
    shape = {"VOCAB": vocab_size, "SPLITS": splits}
    padded = triton.next_power_of_2(splits)
    grid, row = (num_rows, splits), (logits, logits.stride(0), temperature)
    found = (measures, state, limits)
    _measure_kernel[grid](*row, top_k, top_p, min_p, measures, **shape)
    for stage in (0, 1):
        _narrow_kernel[grid](*row, top_k, top_p, *found, **shape, PADDED=padded, STAGE=stage)
    _gather_kernel[grid](*row, top_k, top_p, *found, orders, **shape, PADDED=padded)
    _search_kernel[(num_rows,)](
        *row, top_k, top_p, min_p, *found, orders, cut, **shape, PADDED=padded, num_warps=8
    )
    return cut
