"""Grammar engine `llguidance`: JSON schemas, regexes, choices and Lark, without tables to build."""

from __future__ import annotations

import importlib.util

from quire import hookimpl
from quire.interfaces.plugin import GrammarPlugin

QUIRE_API_VERSION = (1, 0)


def why_unusable() -> str | None:
    """Ask for llguidance without importing it."""
    if importlib.util.find_spec("llguidance") is None:
        return "llguidance is not installed; `pip install 'quire[structured]'` adds it"
    return None


@hookimpl
def quire_grammar_engines() -> list[GrammarPlugin]:
    """Offer `llguidance`."""
    return [
        GrammarPlugin(
            name="llguidance",
            load="quire_grammar.llguidance.engine:LLGuidanceEngine",
            priority=100,
            summary="JSON schema, JSON object, regex, choice and Lark grammars",
            why_unusable=why_unusable,
        )
    ]
