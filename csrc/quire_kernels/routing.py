"""Where tokens go in a mixture of experts, in Triton: the choice, and the plan of tiles.

`mixtures.route` has what the choice means. Both kernels have a launch for what PyTorch makes in
six or more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.overlap import let_next_begin, options, wait_for_previous

MAX_EXPERTS = 4096
# Pairs that a program of the plan looks at together, and warps: of some, and of many.
_SOME, _MANY = (1024, 4), (4096, 16)


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
    if device.type != "meta":
        block, warps = _SOME if num_pairs <= 8192 else _MANY
        _plan_kernel[(num_experts + 1,)](
            expert_ids,
            pairs,
            owners,
            num_pairs,
            count,
            NUM_EXPERTS=num_experts,
            BINS=triton.next_power_of_2(num_experts + 1),
            ROWS=rows,
            BLOCK=min(block, max(64, triton.next_power_of_2(num_pairs))),
            num_warps=warps,
            **options(),
        )
    return pairs, owners
