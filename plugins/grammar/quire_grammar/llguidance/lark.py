"""Lark grammars of strangers, whose lexemes may never let another one begin."""

from __future__ import annotations


def without_forcing(lark: str) -> str:
    """Return a grammar of which the library does not look for the text that has to come.

    It looks until there is a choice. In `/x+/ /x+/` the first part takes every x, nothing but an x
    may ever come, and the library would never return. What is set last counts.
    """
    return f'{lark}\n%llguidance {{"no_forcing": true}}\n'
