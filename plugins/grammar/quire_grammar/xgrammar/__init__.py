"""Grammar engine `xgrammar`: pushdown automata with tables made for each grammar."""

from __future__ import annotations

import importlib.util

from quire import hookimpl
from quire.interfaces.plugin import GrammarPlugin

QUIRE_API_VERSION = (1, 0)


def why_unusable() -> str | None:
    """Ask for xgrammar without importing it."""
    if importlib.util.find_spec("xgrammar") is None:
        return "xgrammar is not installed; `pip install 'quire[xgrammar]'` adds it"
    return None


@hookimpl
def quire_grammar_engines() -> list[GrammarPlugin]:
    """Offer `xgrammar`."""
    return [
        GrammarPlugin(
            name="xgrammar",
            load="quire_grammar.xgrammar.engine:XGrammarEngine",
            priority=50,
            summary="JSON schema, JSON object, regex, choice, GBNF and structural tags",
            why_unusable=why_unusable,
        )
    ]
