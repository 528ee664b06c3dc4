"""A backend that breaks its contract before it is checked is named, in one error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from gather_attention import GatherAttention

from quire.errors import BuildError, PluginError
from quire.execution.kv_cache import (
    ALIGNMENT,
    KVCache,
    LayerGroup,
    bytes_per_slab,
    cache_groups,
    layout_of,
    make_backends,
    rows_of_slabs,
)
from quire.execution.setup import workspace_bytes
from quire.interfaces.attention import AttentionBackend, BatchLimits
from quire.testing.attention_cases import make_spec

LIMITS = BatchLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
SPEC = make_spec()


def group_of(backend: type[AttentionBackend]) -> LayerGroup:
    """Return a group without layers, served by a backend named `mine`."""
    layout = GatherAttention.kv_layout(SPEC)
    return LayerGroup(
        spec=SPEC, layers=[], backend_name="mine", backend_class=backend, layout=layout
    )


def test_constructor_that_raises_is_named() -> None:
    """As the self-check names attend()."""

    class Broken(GatherAttention):
        def __init__(self, *_: Any) -> None:
            raise RuntimeError("no workspace\nto be had.")

    with pytest.raises(
        PluginError, match=r"'mine' raises RuntimeError in __init__\(\): no workspace to be had\. "
    ):
        make_backends([group_of(Broken)], LIMITS)


def test_error_of_quire_passes() -> None:
    """It says already what to do."""

    class Unbuilt(GatherAttention):
        def __init__(self, *_: Any) -> None:
            raise BuildError("no compiler")

    with pytest.raises(BuildError, match="^no compiler$"):
        make_backends([group_of(Unbuilt)], LIMITS)


def test_layout_of_another_type_is_named() -> None:
    """A text is no layout."""

    class Broken(GatherAttention):
        @classmethod
        def kv_layout(cls, spec: Any) -> Any:
            return "layout"

    with pytest.raises(PluginError, match=r"'mine' returns 'layout' from kv_layout\(\)"):
        layout_of("mine", Broken, SPEC)
    assert layout_of("mine", GatherAttention, SPEC) == GatherAttention.kv_layout(SPEC)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"dtype": "bfloat17"}, "wants a KV cache of 'bfloat17', which is no dtype of torch"),
        ({"dtype": "nn"}, "wants a KV cache of 'nn', which is no dtype"),
        (
            {"block_shape": (4, -2)},
            r"wants KV blocks of shape \(4, -2\), where",
        ),
        ({"block_shape": ()}, r"wants KV blocks of shape \(\), where"),
    ],
)
def test_layout_that_no_tensor_can_have_is_named(changes: dict[str, Any], fact: str) -> None:
    class Broken(GatherAttention):
        @classmethod
        def kv_layout(cls, spec: Any) -> Any:
            return evolve(super().kv_layout(spec), **changes)

    with pytest.raises(PluginError, match=f"attention backend 'mine' {fact}"):
        layout_of("mine", Broken, SPEC)


def test_workspace_below_zero_is_named() -> None:
    """It would make room for blocks that are not there."""

    class Broken(GatherAttention):
        @classmethod
        def workspace_bytes(cls, spec: Any, limits: Any) -> int:
            return -5

    with pytest.raises(PluginError, match=r"workspace_bytes\(\): it returns -5, where a number"):
        workspace_bytes([group_of(Broken)], LIMITS)


def test_workspace_that_raises_is_named() -> None:
    """Before any memory is measured."""

    class Broken(GatherAttention):
        @classmethod
        def workspace_bytes(cls, spec: Any, limits: Any) -> int:
            return 1 // 0

    with pytest.raises(PluginError, match=r"ZeroDivisionError in workspace_bytes\(\)"):
        workspace_bytes([group_of(Broken)], LIMITS)


def test_constructor_that_exits_is_named() -> None:
    """The start would end without a word."""

    class Broken(GatherAttention):
        def __init__(self, *_: Any) -> None:
            raise SystemExit(0)

    with pytest.raises(PluginError, match=r"raises SystemExit in __init__\(\): 0"):
        make_backends([group_of(Broken)], LIMITS)


class Layer:
    """A layer that notes what it is bound to."""

    index = 0

    def bind(self, backend: Any, kv_cache: torch.Tensor, group: int) -> None:
        self.kv_cache = kv_cache


def windowed_groups(*kinds: tuple[int, int | None]) -> list[LayerGroup]:
    """Return groups of so many layers with these windows."""
    return [
        evolve(
            group_of(GatherAttention),
            layers=[Layer() for _ in range(count)],
            spec=evolve(SPEC, sliding_window=window),
        )
        for count, window in kinds
    ]


@pytest.mark.parametrize(
    "kinds", [((1, None), (1, 4)), ((5, None), (2, 4)), ((2, None), (7, 4), (3, 8))]
)
@pytest.mark.parametrize("block_shape", [(16, 2, 8), (3,)])
def test_no_two_blocks_of_slabs_lie_in_the_same_place(
    kinds: tuple[tuple[int, int], ...], block_shape: tuple[int, ...]
) -> None:
    groups, num_slabs = windowed_groups(*kinds), 7
    for group in groups:
        group.layout = evolve(group.layout, block_shape=block_shape)
    cache = KVCache(groups, num_slabs, torch.device("cpu"), rows=rows_of_slabs(groups))
    cache.bind(groups, [None] * len(groups))  # type: ignore[list-item]
    first = groups[0].layers[0].kv_cache.data_ptr()
    written = {}
    for number, group in enumerate(cache_groups(groups, num_slabs)):
        slabs = [slab for slab in range(num_slabs) if slab % len(groups) == number]
        blocks = [s + n * group.block_stride for s in slabs for n in range(group.blocks_per_slab)]
        for layer in groups[number].layers:
            for block in blocks:
                written[layer, block] = len(written) + 1.0
                layer.kv_cache[block] = written[layer, block]

    assert all((layer.kv_cache[block] == x).all() for (layer, block), x in written.items())
    assert all(layer.kv_cache.is_contiguous() for layer, _ in written)
    assert all(layer.kv_cache.data_ptr() % ALIGNMENT == first % ALIGNMENT for layer, _ in written)
    storages = {layer.kv_cache.untyped_storage().data_ptr() for layer, _ in written}
    assert len(storages) == 1
    nbytes = groups[0].layers[0].kv_cache.untyped_storage().nbytes()
    # Rows end at multiples of the alignment, a block of 3 numbers included.
    assert 0 <= nbytes - num_slabs * bytes_per_slab(groups) <= rows_of_slabs(groups) * 3 * 256


def test_copies_of_all_groups_read_before_any_is_written() -> None:
    groups = windowed_groups((1, None), (1, 4))
    cache = KVCache(groups, 4, torch.device("cpu"), rows=rows_of_slabs(groups))
    first, second = cache.tensors[0][0], cache.tensors[1][0]
    first[1], second[2] = 1.0, 2.0

    cache.copy_blocks([(0, 1, 2), (1, 2, 3)])  # slab 2 goes from one group to the other

    assert (first[2] == 1.0).all()
    assert (second[3] == 2.0).all()


@pytest.mark.parametrize(
    ("kinds", "changes"),
    [([(4, None)], {}), ([(2, 4), (3, 4)], {}), ([(2, 4), (3, None)], {"dtype": "float64"})],
    ids=["one kind", "one window", "blocks of other sizes"],
)
def test_groups_that_gain_nothing_keep_memory_of_their_own(kinds: Any, changes: Any) -> None:
    groups = windowed_groups(*kinds)
    groups[0].layout = evolve(groups[0].layout, **changes)

    assert rows_of_slabs(groups) is None
    assert {group.blocks_per_slab for group in cache_groups(groups, 5)} == {None}
    assert bytes_per_slab(groups) == sum(group.bytes_per_block for group in groups)
