"""Choose the grammar engine, whose class is imported only where grammars are compiled."""

from __future__ import annotations

from quire.errors import ConfigError
from quire.hooks.candidates import Candidates, as_sentence, comes_after
from quire.hooks.registry import Registry
from quire.interfaces.grammar import GrammarEngine
from quire.interfaces.plugin import GrammarPlugin, Selection


def select_grammar(
    registry: Registry, requested: str
) -> tuple[GrammarPlugin | None, Selection | None, str]:
    """Choose the engine; under `auto`, None where none can be used, and why not.

    Raises: ConfigError where the requested one is unknown or cannot be used here.
    """
    if requested != "auto":
        plugin = registry.grammar(requested)
        reason = registry.entry("grammar", requested).unusable
        if reason is not None:
            raise ConfigError(
                f"--grammar-backend {requested} cannot be used: {as_sentence(reason)} Ask for "
                f"another ({registry.installed('grammar')}) or leave the choice out."
            )
        why = "asked for by name"
        return plugin, Selection(kind="grammar", requested=requested, used=requested, why=why), ""
    engines = sorted(
        (registry.grammar(name) for name in registry.names("grammar")), key=lambda p: -p.priority
    )
    passed_over: list[tuple[str, str]] = []
    for position, plugin in enumerate(engines, 1):
        reason = registry.entry("grammar", plugin.name).unusable
        if reason is None:
            passed_over += [(p.name, comes_after(p.priority)) for p in engines[position:]]
            why = f"priority {plugin.priority}, the highest that can be used"
            choice = Selection(
                kind="grammar", requested="auto", used=plugin.name, why=why, passed_over=passed_over
            )
            return plugin, choice, ""
        passed_over.append((plugin.name, as_sentence(reason)))
    reasons = " ".join(f"{name}: {reason}" for name, reason in passed_over)
    return None, None, reasons or "no grammar engine is installed."


def load_grammar_engine(registry: Registry, name: str) -> type[GrammarEngine]:
    """Import an engine's class. Raises: ConfigError, PluginError."""
    candidates = Candidates(
        registry=registry, kind="grammar", contract=GrammarEngine, ask=lambda _: None
    )
    return candidates.require(registry.grammar(name))
