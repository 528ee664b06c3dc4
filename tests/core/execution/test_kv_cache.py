"""A backend that breaks its contract before it is checked is named, in one error."""

from __future__ import annotations

from typing import Any

import pytest
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
