"""Classes that keep the contracts of attention backends and samplers, and do nothing."""

from __future__ import annotations

import sys
import types
from typing import Any

from quire.interfaces.attention import AttentionBackend, AttentionSpec, KVLayout
from quire.interfaces.sampling import LogitsProcessor, Sampler

MODULE = "quire_fake_classes"

SPEC = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    value_head_dim=16,
    scale=0.25,
    dtype="float32",
    kv_dtype="float32",
    block_size=16,
    device="cpu",
)


class FakeBackend(AttentionBackend):
    """A backend that serves everything; subclasses set `answer`."""

    answer: Any = None

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        if isinstance(cls.answer, BaseException):
            raise cls.answer
        return cls.answer

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        return KVLayout(name="fake", block_shape=(1,), dtype=spec.kv_dtype)

    def plan(self, batch: Any, group: int) -> Any:
        return None

    def write(self, *arguments: Any) -> None:
        return None

    def attend(self, *arguments: Any) -> None:
        return None


class FakeSampler(Sampler):
    """A sampler that runs everywhere; subclasses set `answer`."""

    answer: Any = None

    @classmethod
    def why_unsupported(cls, device: str) -> str | None:
        return cls.answer

    def sample(self, logits: Any, batch: Any) -> Any:
        return None


class FakeProcessor(LogitsProcessor):
    """A processor that changes nothing."""

    name = "fake"

    def apply(self, logits: Any, state: Any) -> Any:
        return logits


class UnfinishedBackend(FakeBackend):
    """A backend whose author forgot a method."""

    attend = AttentionBackend.attend  # type: ignore[assignment]


class BackendWithoutPlan(FakeBackend):
    """A backend whose author took a method away."""

    plan = None  # type: ignore[assignment]


def add_class(monkeypatch: Any, kind: type, answer: Any = None) -> str:
    """Make a class that gives the answer importable and return what `load` must say."""
    if MODULE not in sys.modules:
        monkeypatch.setitem(sys.modules, MODULE, types.ModuleType(MODULE))
    name = f"Class{len(vars(sys.modules[MODULE]))}"
    setattr(sys.modules[MODULE], name, type(name, (kind,), {"answer": answer}))
    return f"{MODULE}:{name}"
