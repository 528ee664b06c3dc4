"""A backend that breaks its contract before it is checked is named, in one error."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from gather_attention import GatherAttention

from quire.errors import BuildError, PluginError
from quire.execution.kv_cache import LayerGroup, layout_of, make_backends
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
