"""Find the parsers of answers that are asked for by name."""

from __future__ import annotations

from quire.hooks.candidates import Candidates
from quire.hooks.registry import Registry
from quire.interfaces.answer_parsing import ReasoningParser, ToolCallParser


def require_tool_call_parser(registry: Registry, name: str) -> type[ToolCallParser]:
    """Return a tool-call parser's class.

    Raises: ConfigError for an unknown or unusable one, PluginError for one without its contract.
    """
    candidates = Candidates(
        registry=registry, kind="tool-call-parser", contract=ToolCallParser, ask=lambda _: None
    )
    return candidates.require(registry.entry("tool-call-parser", name).descriptor)


def require_reasoning_parser(registry: Registry, name: str) -> type[ReasoningParser]:
    """Return a reasoning parser's class.

    Raises: ConfigError for an unknown or unusable one, PluginError for one without its contract.
    """
    candidates = Candidates(
        registry=registry, kind="reasoning-parser", contract=ReasoningParser, ask=lambda _: None
    )
    return candidates.require(registry.entry("reasoning-parser", name).descriptor)
