"""A plugin whose code is compiled, without a compiler: `build` notes that it was called."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from fake_distributions import attention

from quire.interfaces.plugin import AttentionPlugin


class FakeBuild:
    """The build of a plugin; `error` is raised by it, `result` returned."""

    def __init__(self, monkeypatch: Any, name: str) -> None:
        self.name = name
        self.built = False
        self.finishes = True
        self.calls = 0
        self.error: BaseException | None = None
        self.result: Any = "it is there"
        self._module = types.ModuleType(f"fake_build_{name}")
        self._module.build = self._build  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, self._module.__name__, self._module)

    def descriptor(self, load: str = "nowhere:Nothing", **values: Any) -> AttentionPlugin:
        """Return an attention backend that needs this build."""
        place = f"{self._module.__name__}:build"
        return attention(self.name, load, build=place, is_built=lambda: self.built, **values)

    def _build(self, progress: Callable[[str], None]) -> Any:
        self.calls += 1
        progress("half of it")
        if self.error is not None:
            raise self.error
        self.built = self.finishes
        return self.result
