"""The backend keeps its contract: Quire's conformance kit says so."""

from __future__ import annotations

from quire.testing import AttentionBackendTests
from quire_example.attention import TiledAttention


class TestTiledAttention(AttentionBackendTests):
    """With tiles so small that most sequences need several."""

    backend = TiledAttention
    options = {"tile": 5}
