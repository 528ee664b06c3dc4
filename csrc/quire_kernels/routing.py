"""Where tokens go in a mixture of experts, in Triton: the choice, and the plan of tiles.

`mixtures.route` has what the choice means. It takes a launch, and so does a plan, or two of many
pairs, for what PyTorch makes in six or more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.overlap import let_next_begin, options, wait_for_previous

MAX_EXPERTS = 4096
# Pairs that a program of the plan looks at together.
_BLOCK = 1024
# Of more pairs a plan is made in two launches, whose programs have a chunk of them each.
MANY_PAIRS, CHUNK, _FEW_PAIRS, _ROWS_OF_COUNTS = 8192, 512, 64, 8


@triton.jit(launch_metadata=costs.of_tensors)
def _route_kernel(
    logits_ptr,
    weights_ptr,
    ids_ptr,
    stride,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    NORMALISED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Choose one token's experts, of equal ones the first."""
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    experts, slots = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    is_expert = experts < NUM_EXPERTS
    logits = tl.load(logits_ptr + token * stride + experts, mask=is_expert, other=float("-inf"))
    logits = logits.to(tl.float32)
    chances = tl.where(is_expert, tl.exp(logits - tl.max(logits, 0)), 0.0)
    chances = chances / tl.sum(chances, 0)
    # With a NaN all chances are one, and the experts are chosen all the same.
    order = tl.where(is_expert, tl.where(chances == chances, chances, 0.0), -2.0)
    weights = tl.zeros([SLOTS], tl.float32)
    ids = tl.zeros([SLOTS], tl.int64)
    for slot in tl.static_range(TOP_K):
        best = tl.argmax(order, 0, tie_break_left=True)
        weight = tl.sum(tl.where(experts == best, chances, 0.0), 0)
        weights = tl.where(slots == slot, weight, weights)
        ids = tl.where(slots == slot, best.to(tl.int64), ids)
        order = tl.where(experts == best, -1.0, order)
    if NORMALISED:
        weights = weights / tl.sum(weights, 0)
    at = token * TOP_K + slots
    tl.store(weights_ptr + at, weights, mask=slots < TOP_K)
    tl.store(ids_ptr + at, ids, mask=slots < TOP_K)


def serves(logits: Tensor, top_k: int) -> bool:
    """Answer whether the kernel takes these logits."""
    num_experts = logits.shape[1]
    is_small = num_experts <= MAX_EXPERTS and 0 < top_k <= min(64, num_experts)
    return is_small and logits.stride(1) == 1 and logits.dtype != torch.float64


def route(logits: Tensor, top_k: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """Return `mixtures.route` where this module serves."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_tokens, top_k), dtype=torch.int64, device=logits.device)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits,
            weights,
            ids,
            logits.stride(0),
            NUM_EXPERTS=num_experts,
            TOP_K=top_k,
            BLOCK=triton.next_power_of_2(num_experts),
            SLOTS=triton.next_power_of_2(top_k),
            NORMALISED=normalise,
            num_warps=1 if num_experts <= 256 else 4,
            **options(),
        )
    return weights, ids


@triton.jit
def _block_of_ids(ids_ptr, start, num_pairs, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the numbers of BLOCK pairs and their experts; where there is no pair, NUM_EXPERTS."""
    pairs = start + tl.arange(0, BLOCK)
    return pairs, tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=NUM_EXPERTS).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"], launch_metadata=costs.of_tensors)
def _plan_kernel(
    ids_ptr,
    pairs_ptr,
    owners_ptr,
    num_pairs,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Fill one expert's tiles; the program after the last fills those that nobody needs."""
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        _, ids = _block_of_ids(ids_ptr, start, num_pairs, NUM_EXPERTS, BLOCK)
        counts += tl.histogram(ids, BINS)
    tiles = tl.where(bins < NUM_EXPERTS, (counts + (ROWS - 1)) // ROWS, 0)
    first = tl.sum(tl.where(bins < expert, tiles, 0), 0)
    last = first + tl.sum(tl.where(bins == expert, tiles, 0), 0)
    if expert == NUM_EXPERTS:
        last = num_tiles
    for tile in range(first, last):
        tl.store(owners_ptr + tile, tl.minimum(expert, NUM_EXPERTS - 1).to(tl.int64))
    # An expert's pairs in order, and behind them places without one.
    done = first * ROWS
    if expert < NUM_EXPERTS:
        for start in range(0, num_pairs, BLOCK):
            pairs, ids = _block_of_ids(ids_ptr, start, num_pairs, NUM_EXPERTS, BLOCK)
            own = (ids == expert).to(tl.int32)
            places = done + tl.cumsum(own, 0) - 1
            tl.store(pairs_ptr + places, pairs.to(tl.int64), mask=own > 0)
            done += tl.sum(own, 0)
    for start in range(done, last * ROWS, BLOCK):
        places = start + tl.arange(0, BLOCK)
        nobody = tl.zeros([BLOCK], tl.int64) + num_pairs
        tl.store(pairs_ptr + places, nobody, mask=places < last * ROWS)


@triton.jit(do_not_specialize=["num_pairs"], launch_metadata=costs.of_tensors)
def _count_kernel(
    ids_ptr,
    counts_ptr,
    num_pairs,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Count the pairs that each expert has in a chunk."""
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    chunk = tl.program_id(0)
    _, ids = _block_of_ids(ids_ptr, chunk * CHUNK, num_pairs, NUM_EXPERTS, CHUNK)
    tl.store(counts_ptr + chunk * BINS + tl.arange(0, BINS), tl.histogram(ids, BINS))


@triton.jit
def _of_bin(values, wanted, bins):
    """Return values[wanted], which lie in registers: one of a row is not zero."""
    return tl.sum(tl.where(wanted[:, None] == bins[None, :], values[None, :], 0), 1)


@triton.jit(
    do_not_specialize=["num_pairs", "num_tiles", "tiles_each"], launch_metadata=costs.of_tensors
)
def _place_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    owners_ptr,
    num_pairs,
    num_tiles,
    tiles_each,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Place a chunk's pairs behind those of the chunks before, and fill up some tiles."""
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    chunk = tl.program_id(0)
    bins, heights = tl.arange(0, BINS), tl.arange(0, HEIGHT)
    counts = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)
    for start in range(0, tl.num_programs(0), HEIGHT):
        at = start + heights
        inside = (at < tl.num_programs(0))[:, None]
        own = tl.load(counts_ptr + at[:, None] * BINS + bins[None, :], mask=inside, other=0)
        counts += tl.sum(own, 0)
        before += tl.sum(tl.where((at < chunk)[:, None], own, 0), 0)
    tiles = tl.where(bins < NUM_EXPERTS, (counts + (ROWS - 1)) // ROWS, 0)
    lasts = tl.cumsum(tiles, 0)
    firsts = lasts - tiles

    places = firsts * ROWS + before
    lanes = tl.arange(0, BLOCK)
    for start in range(0, CHUNK, BLOCK):
        pairs, ids = _block_of_ids(ids_ptr, chunk * CHUNK + start, num_pairs, NUM_EXPERTS, BLOCK)
        # The same once more, along the other axis.
        others = tl.load(
            ids_ptr + chunk * CHUNK + start + lanes,
            mask=chunk * CHUNK + start + lanes < num_pairs,
            other=NUM_EXPERTS,
        ).to(tl.int32)
        is_before = (ids[:, None] == others[None, :]) & (lanes[None, :] < lanes[:, None])
        at = _of_bin(places, ids, bins) + tl.sum(is_before.to(tl.int32), 1)
        tl.store(pairs_ptr + at, pairs.to(tl.int64), mask=pairs < num_pairs)
        places += tl.histogram(ids, BINS)

    within = tl.arange(0, ROWS)
    for tile in range(chunk * tiles_each, min((chunk + 1) * tiles_each, num_tiles)):
        # Of the last expert are those too that nobody needs.
        owner = tl.minimum(tl.sum((lasts <= tile).to(tl.int32), 0), NUM_EXPERTS - 1)
        is_own = bins == owner
        done = (tile - tl.sum(tl.where(is_own, firsts, 0), 0)) * ROWS
        left = tl.sum(tl.where(is_own, counts, 0), 0) - done
        nobody = tl.zeros([ROWS], tl.int64) + num_pairs
        tl.store(pairs_ptr + tile * ROWS + within, nobody, mask=within >= left)
        tl.store(owners_ptr + tile, owner.to(tl.int64))


def num_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """Return how many tiles are enough, however the pairs lie."""
    return min(num_pairs, num_pairs // rows + min(num_experts, num_pairs))


def plan(expert_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return the pairs of each tile, [num_tiles * rows], and its expert, [num_tiles].

    `expert_ids` int64 [num_pairs]. Where there is no pair the number is num_pairs; tiles at the end
    may have none. Nothing is read back to the host.
    """
    num_pairs, device = len(expert_ids), expert_ids.device
    count = num_tiles(num_pairs, num_experts, rows)
    pairs = torch.empty(count * rows, dtype=torch.int64, device=device)
    owners = torch.empty(count, dtype=torch.int64, device=device)
    if device.type == "meta":
        return pairs, owners
    if num_pairs > MANY_PAIRS:
        _plan_many(expert_ids, pairs, owners, num_experts, rows)
    else:
        _plan_kernel[(num_experts + 1,)](
            expert_ids,
            pairs,
            owners,
            num_pairs,
            count,
            NUM_EXPERTS=num_experts,
            BINS=triton.next_power_of_2(num_experts + 1),
            ROWS=rows,
            BLOCK=min(_BLOCK, max(64, triton.next_power_of_2(num_pairs))),
            num_warps=4,
            **options(),
        )
    return pairs, owners


def _plan_many(
    expert_ids: Tensor, pairs: Tensor, owners: Tensor, num_experts: int, rows: int
) -> None:
    """Fill the plan of many pairs."""
    num_pairs = len(expert_ids)
    chunks, bins = triton.cdiv(num_pairs, CHUNK), triton.next_power_of_2(num_experts + 1)
    counts = torch.empty((chunks, bins), dtype=torch.int32, device=expert_ids.device)
    _count_kernel[(chunks,)](
        expert_ids,
        counts,
        num_pairs,
        NUM_EXPERTS=num_experts,
        BINS=bins,
        CHUNK=CHUNK,
        num_warps=4,
        **options(),
    )
    _place_kernel[(chunks,)](
        expert_ids,
        counts,
        pairs,
        owners,
        num_pairs,
        len(owners),
        triton.cdiv(len(owners), chunks),
        NUM_EXPERTS=num_experts,
        BINS=bins,
        ROWS=rows,
        CHUNK=CHUNK,
        BLOCK=_FEW_PAIRS,
        HEIGHT=_ROWS_OF_COUNTS,
        num_warps=8,
        **options(),
    )
