"""Fixtures of the tests of hooks, registry and selection."""

from __future__ import annotations

import pytest
from fake_distributions import Installed


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Return an empty set of installed distributions to fill."""
    return Installed(monkeypatch)
