"""What is missing is said in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quire.benchmark.chart import draw
from quire.benchmark.load import check_installed
from quire.errors import ConfigError


def test_client_that_is_not_installed_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)

    with pytest.raises(ConfigError, match=r"pip install 'quire\[bench\]'"):
        check_installed()


def test_diagrams_without_matplotlib_are_one_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(ConfigError, match=r"pip install 'quire\[bench\]'"):
        draw([], tmp_path / "x.png")


def test_diagram_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        draw([], tmp_path / "nowhere" / "x.png")
