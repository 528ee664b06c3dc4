"""Distributions that exist in memory only: metadata for importlib, modules in `sys.modules`."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire import hookimpl
from quire.interfaces.model_config import ModelConfig
from quire.interfaces.plugin import API_VERSION, AttentionPlugin, ModelPlugin


class FakeDistribution(importlib.metadata.Distribution):
    """A distribution with a name, a version and entry points of the group `quire`."""

    def __init__(self, name: str, version: str, **entries: str) -> None:
        lines = [f"{entry.replace('_', '-')} = {module}" for entry, module in entries.items()]
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            "entry_points.txt": "\n".join(["[quire]", *lines, ""]),
        }

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path("nowhere") / path


class Installed:
    """What is installed during one test; `monkeypatch` takes it away again."""

    def __init__(self, monkeypatch: Any) -> None:
        self._monkeypatch = monkeypatch
        self._distributions: list[FakeDistribution] = []
        monkeypatch.setattr(
            importlib.metadata, "distributions", lambda **_: iter(self._distributions)
        )

    def distribution(self, name: str, version: str = "1.0", **entries: str) -> None:
        """Install a distribution whose entry points name modules that already exist, or not."""
        self._distributions.append(FakeDistribution(name, version, **entries))

    def plugin(
        self, entry: str, distribution: str = "", *, version: str = "1.0", **content: Any
    ) -> types.ModuleType:
        """Install a distribution with one plugin; `content` are its module's attributes.

        Functions become hook implementations, but those in `content["unmarked"]`.
        """
        unmarked = content.pop("unmarked", {})
        distribution = distribution or f"{entry}-package"
        module = types.ModuleType(f"fake_{distribution}_{entry}".replace("-", "_"))
        content.setdefault("QUIRE_API_VERSION", API_VERSION)
        for name, value in content.items():
            setattr(module, name, hookimpl(value) if callable(value) else value)
        vars(module).update(unmarked)
        self._monkeypatch.setitem(sys.modules, module.__name__, module)
        self.distribution(distribution, version, **{entry: module.__name__})
        return module


def attention(name: str, load: str = "nowhere:Nothing", **values: Any) -> AttentionPlugin:
    """Return a descriptor that is enough for a registry."""
    return AttentionPlugin(name=name, load=load, **values)


def model(name: str, *architectures: str, **values: Any) -> ModelPlugin:
    """Return a descriptor that claims the architectures."""
    return ModelPlugin(
        name=name,
        load="nowhere:Nothing",
        architectures=architectures,
        config_class=ModelConfig,
        **values,
    )


def returning(value: Any) -> Callable[[], Any]:
    """Return a hook implementation that returns the value."""

    def implementation() -> Any:
        return value

    return implementation


def raising(error: BaseException) -> Callable[[], Any]:
    """Return a function without arguments that raises the error."""

    def implementation() -> Any:
        raise error

    return implementation
