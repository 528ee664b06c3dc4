"""The grammar engines that come with Quire pass the kit."""

from __future__ import annotations

import pytest
from attrs import evolve

from quire.hooks.grammars import load_grammar_engine
from quire.hooks.registry import load_plugins
from quire.testing import check_grammar
from quire.testing.kit_report import PROFILES

SHORT = evolve(PROFILES["quick"], seconds=1.5)


@pytest.mark.parametrize("name", ["llguidance", "xgrammar"])
def test_engine_passes_the_kit(name: str) -> None:
    pytest.importorskip(name)

    report = check_grammar(load_grammar_engine(load_plugins(), name), profile=SHORT)

    assert report.passed, [check.detail for check in report.checks]
