"""Layers with a window hold what their next tokens read, and no more: counts, no tensors."""

from __future__ import annotations

import itertools

import pytest
from builders import Harness, make_harness, make_sequence

from quire.scheduling.block_manager import BlockManager
from quire.scheduling.footprint import slab_rows, slabs_a_sequence
from quire.scheduling.output import KVCacheGroup

CONTEXT = 32768
STEP = 2048


def make_groups(
    layers: tuple[int, int], window: int, num_slabs: int, block_size: int = 16
) -> list[KVCacheGroup]:
    """Return a group that keeps everything and one with a window, in slabs."""
    rows = slab_rows(layers)
    return [
        KVCacheGroup(
            layers=tuple(range(count)),
            block_size=block_size,
            bytes_per_block=count,
            num_blocks=num_slabs + 1,
            window=own,
            blocks_per_slab=rows // count,
            block_stride=count * (num_slabs + 1),
        )
        for count, own in zip(layers, (None, window), strict=True)
    ]


def make_windowed(groups: list[KVCacheGroup], **options: int) -> Harness:
    """Return a scheduler over these groups."""
    step = options["max_num_batched_tokens"]
    manager = BlockManager(groups, enable_prefix_caching=True, max_step_tokens=step)
    return make_harness(manager=manager, **options)


# Full layers, layers with a window, the window; then blocks of 16 by hand: a full layer's 2,048,
# and ceil((window - 1 + step - 1) / 16) + 1 of the others; layers' blocks in a slab.
SHAPES = {
    "Gemma 3 27B": ((10, 52), 1024, 193, 52),
    "Gemma 3 1B": ((4, 22), 1024, 193, 24),
    "Gemma 2 9B": ((21, 21), 4096, 385, 21),
    "GPT-OSS 20B": ((12, 12), 128, 137, 12),
}


@pytest.mark.parametrize("name", SHAPES)
def test_context_of_32k_needs_what_the_arithmetic_says(name: str) -> None:
    (full, windowed), window, most, rows = SHAPES[name]
    assert slab_rows((full, windowed)) == rows
    expected = -(-2048 // (rows // full)) + most
    groups = make_groups((full, windowed), window, expected)
    assert slabs_a_sequence(groups, CONTEXT, STEP) == expected
    harness = make_windowed(groups, max_model_len=CONTEXT, max_num_batched_tokens=STEP)
    slabs = harness.manager.slabs
    assert slabs is not None

    harness.add("long", [n % 97 for n in range(CONTEXT - 64)], max_tokens=64)
    held = []
    while harness.scheduler.has_unfinished():
        harness.step()
        held.append(slabs.num_usable - slabs.num_free)

    assert max(held) <= expected
    assert harness.scheduler.num_preemptions == 0
    # While it decodes: the window, and a block that is begun. Sixteen steps later it shows.
    assert max(held[32:-1]) <= -(-2048 // (rows // full)) + -(-(window - 1) // 16) + 2


@pytest.mark.parametrize(("num_usable", "fits"), [(193, True), (192, False)])
def test_window_alone_needs_no_more_than_it_and_a_step(num_usable: int, fits: bool) -> None:
    group = KVCacheGroup(
        layers=(0,), block_size=16, bytes_per_block=1, num_blocks=num_usable + 1, window=1024
    )
    harness = make_windowed([group], max_model_len=CONTEXT, max_num_batched_tokens=STEP)
    assert harness.manager.can_ever_fit(CONTEXT) is fits
    if not fits:
        return

    harness.add("long", [n % 97 for n in range(CONTEXT - 8)], max_tokens=8)
    while harness.scheduler.has_unfinished():
        harness.step()

    assert harness.scheduler.num_preemptions == 0


def test_long_and_short_sequences_share_the_same_memory() -> None:
    """Slabs that a window leaves serve prompts that need as many blocks of each kind."""
    groups = make_groups((1, 1), 32, 60, block_size=4)
    harness = make_windowed(groups, max_model_len=200, max_num_batched_tokens=16, max_num_seqs=16)
    harness.add("long", list(range(120)), max_tokens=60)
    for _ in range(12):
        harness.step()
    assert harness.manager.num_free_blocks >= 60 - 33 - 10

    for number in range(3):
        harness.add(str(number), [number] * 8, max_tokens=4)
    for _ in range(3):
        harness.step()

    assert harness.scheduler.num_running == 4


def test_hit_needs_the_last_window_only() -> None:
    groups = make_groups((1, 1), 8, 40, block_size=4)
    manager = BlockManager(groups, enable_prefix_caching=True, max_step_tokens=16)
    first = make_sequence(list(range(41)))
    assert manager.admit(first)
    for end in (16, 32, 41):
        manager.leave_behind(first, first.num_computed_tokens)
        assert manager.reserve(first, end) is not None
        first.num_computed_tokens = end
        manager.commit(first, end)
    left = first.num_left_blocks[1]
    manager.give_back(manager.detach(first))
    pool = manager.pools[1]
    early = [pool.cache.find(key) for key in first.digests[0][:left]]
    for block_id in filter(None, early):  # as if others had needed its slab
        manager.slabs.idle.pop(block_id)
        pool.forget(block_id)
        manager.slabs.free.append(block_id)

    second = make_sequence(list(range(44)))
    assert manager.admit(second)

    assert left >= 6
    assert second.num_computed_tokens == 40
    assert second.block_tables[1][:8] == [0] * 8
    assert all(second.block_tables[1][8:10])


def test_hit_ends_before_a_hole_in_the_window() -> None:
    groups = make_groups((1, 1), 8, 40, block_size=4)
    manager = BlockManager(groups, enable_prefix_caching=True)
    first = make_sequence(list(range(41)))
    assert manager.admit(first)
    first.num_computed_tokens = 41
    manager.commit(first, 41)
    manager.give_back(manager.detach(first))
    hole = manager.pools[1].cache.find(first.digests[0][8])
    manager.slabs.idle.pop(hole)
    manager.pools[1].forget(hole)
    manager.slabs.free.append(hole)

    second = make_sequence(list(range(41)))
    assert manager.admit(second)

    assert second.num_computed_tokens == 32  # of 40 that the other group has


@pytest.mark.parametrize("windows", [(None,), (8, None), (8,)])
def test_head_of_the_queue_is_admitted_once_another_has_its_prefix(
    windows: tuple[int | None, ...],
) -> None:
    """It waits for 10 blocks, which do not come free; then it shares those of the first."""
    groups = [
        KVCacheGroup(layers=(0,), block_size=4, bytes_per_block=1, num_blocks=17, window=window)
        for window in windows
    ]
    manager = BlockManager(groups, enable_prefix_caching=True, max_step_tokens=40)
    first, second = make_sequence(list(range(41))), make_sequence(list(range(41)))
    assert manager.admit(first)
    assert not manager.admit(second)
    assert not manager.admit(second)

    first.num_computed_tokens = 41
    manager.commit(first, 41)

    assert manager.admit(second)
    assert second.num_computed_tokens == 40


def test_siblings_fork_though_their_parent_goes_on() -> None:
    groups = make_groups((1, 1), 4, 40, block_size=2)
    harness = make_windowed(groups, max_model_len=64, max_num_batched_tokens=8, max_num_seqs=2)
    harness.add("other", [1, 2, 3], max_tokens=9)
    harness.add("family", list(range(6)), max_tokens=20, n=2)
    outputs = []
    while harness.scheduler.has_unfinished():
        outputs.append(harness.step())

    added = list(itertools.chain.from_iterable(output.added for output in outputs))
    [sibling] = [a for a in added if a.index == 1]
    assert sibling.num_computed_tokens == 5, "it shares the prompt, nine steps later"


@pytest.mark.parametrize(
    ("counts", "rows"),
    [((1, 1), 1), ((4, 22), 24), ((5, 29), 30), ((10, 52), 52), ((7, 21), 21), ((2, 3, 6), 6)],
)
def test_slabs_waste_little(counts: tuple[int, ...], rows: int) -> None:
    assert slab_rows(counts) == rows
    assert all(rows % count / rows <= 1 / 11 for count in counts)
