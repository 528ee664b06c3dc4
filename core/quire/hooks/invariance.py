"""Which plugins would do where `--deterministic` asks for one that is batch-invariant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quire.errors import ConfigError
from quire.hooks.kinds import KINDS
from quire.hooks.registry import Registry
from quire.interfaces.attention import NOT_INVARIANT
from quire.interfaces.quantization import LayerSpec, QuantizationMethod


def declares_invariance(found: Any) -> bool:
    """Answer whether a plugin's class declares to be batch-invariant."""
    return getattr(found, "batch_invariant", False) is True


def why_not_invariant(registry: Registry, kind: str, found: type) -> str | None:
    """Return None for a class that declares to be batch-invariant, else why not, and who does."""
    if declares_invariance(found):
        return None
    return f"{NOT_INVARIANT}; {who_is(registry, kind, declares_invariance)}"


def who_is(registry: Registry, kind: str, would_do: Callable[[Any], bool]) -> str:
    """Return which installed plugins of a kind would do, in words.

    Those that cannot be used here, or are not built, are not asked.
    """
    names = [name for name in registry.names(kind) if _would_do(registry, kind, name, would_do)]
    return f"of those installed these would do: {', '.join(names) or 'none'}"


def _would_do(registry: Registry, kind: str, name: str, would_do: Callable[[Any], bool]) -> bool:
    entry = registry.entry(kind, name)
    if entry.unusable is not None or not entry.is_built():
        return False
    try:
        return would_do(entry.descriptor.load_class())
    except Exception:  # noqa: BLE001  it is told where the plugin is asked for
        return False


def refuse_model(registry: Registry, name: str) -> ConfigError:
    """Return the error of a model implementation that is not batch-invariant."""
    others = who_is(registry, "model", declares_invariance)
    return ConfigError(
        f"--deterministic: {KINDS['model'].title} {name!r} cannot be used: {NOT_INVARIANT}; "
        f"{others}. Take another model, or leave --deterministic out."
    )


def refuse_layer(registry: Registry, name: str, spec: LayerSpec) -> ConfigError:
    """Return the error of a quantization method whose layer is not batch-invariant."""

    def would_do(method: type[QuantizationMethod]) -> bool:
        made = method(method.example_config)
        layer = made.method_for(spec) if made.why_unsupported(spec) is None else None
        return layer is not None and declares_invariance(layer)

    others = who_is(registry, "quantization", would_do)
    return ConfigError(
        f"--deterministic: {KINDS['quantization'].title} {name!r} cannot be used: how it keeps "
        f"{spec.name!r} does not declare batch_invariant; {others}. Take another checkpoint or "
        "--quantization, or leave --deterministic out."
    )
