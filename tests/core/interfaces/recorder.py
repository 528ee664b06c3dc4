"""Note who reads which field of an attrs class, and where the reader's code lies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

Field = tuple[str, str]


class Spy:
    """Stand before a slot, let everything through, and tell the recorder."""

    def __init__(self, slot: Any, field: Field, recorder: Recorder) -> None:
        self._slot, self._field, self._recorder = slot, field, recorder

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self._slot
        self._recorder.note(self._field, sys._getframe(1).f_code.co_filename)
        return self._slot.__get__(instance, owner)

    def __set__(self, instance: Any, value: Any) -> None:
        self._slot.__set__(instance, value)


class Recorder:
    """The fields that were read by fakes, and by Quire."""

    def __init__(self) -> None:
        self.fields: set[Field] = set()
        self.read_by_fakes: set[Field] = set()
        self.read_by_quire: set[Field] = set()

    def watch(self, cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watch all fields of a class that has slots."""
        own = [a.name for a in attrs.fields(cls) if not a.inherited]
        for name in own:
            field = (cls.__name__, name)
            self.fields.add(field)
            monkeypatch.setattr(cls, name, Spy(cls.__dict__[name], field, self))

    def note(self, field: Field, filename: str) -> None:
        """Count a read; what attrs itself reads, to compare or print, is none."""
        if filename.startswith("<attrs generated"):
            return
        if Path(filename).name.startswith("fake_"):
            self.read_by_fakes.add(field)
        elif "/tests/" not in filename:
            self.read_by_quire.add(field)
