"""How much of the KV cache a sequence may ever hold, where layers with a window forget the rest.

Groups whose blocks are cut from the same memory count it in slabs: one is a block of a group, or
several of a group with fewer layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quire.scheduling.output import KVCacheGroup


def first_kept_block(position: int, window: int, block_size: int) -> int:
    """Return the first block that tokens from `position` on read."""
    return max(0, position - window + 1) // block_size


def most_blocks(num_tokens: int, block_size: int, window: int | None, max_step_tokens: int) -> int:
    """Return how many blocks of a group a sequence holds at most on its way to `num_tokens`.

    With a window it holds that of the next token, and room for as many as a step computes:

        ... freed ...|  window - 1  |  max_step_tokens  |
                   any place in a block
    """
    blocks = -(-num_tokens // block_size)
    if window is None:
        return blocks
    span = window - 1 + max_step_tokens
    return min(blocks, -(-(span - 1) // block_size) + 1)


def slab_rows(layer_counts: Iterable[int]) -> int:
    """Return how many layers' blocks a slab holds, so that each group wastes little of it.

    At least a block of the group with the most layers, fewer than two.
    """
    counts = set(layer_counts)
    most = max(counts)
    return min(range(most, 2 * most), key=lambda rows: max(rows % n / rows for n in counts))


def slabs_for(groups: Sequence[KVCacheGroup], blocks: Sequence[int]) -> int:
    """Return how many slabs so many blocks of each group take; without slabs, the most of them."""
    if any(group.blocks_per_slab is None for group in groups):
        return max(blocks)
    pairs = zip(groups, blocks, strict=True)
    return sum(-(-count // (group.blocks_per_slab or 1)) for group, count in pairs)


def slabs_a_sequence(groups: Sequence[KVCacheGroup], num_tokens: int, max_step_tokens: int) -> int:
    """Return how many slabs a sequence of this length holds at most, alone."""
    blocks = [most_blocks(num_tokens, g.block_size, g.window, max_step_tokens) for g in groups]
    return slabs_for(groups, blocks)
