"""The kit passes right grammar engines, catches broken ones, and says what is wrong."""

from __future__ import annotations

import re

import pytest
from attrs import evolve

pytest.importorskip("llguidance")
from broken_grammars import BROKEN, Engine

from quire.testing import GrammarEngineTests, check_grammar
from quire.testing.kit_report import PROFILES

# As many cases on a slow machine as on a fast one.
PATIENT = evolve(PROFILES["quick"], seconds=60, examples=120)


class TestLLGuidance(GrammarEngineTests):
    engine = Engine
    profile = evolve(PROFILES["quick"], examples=60)


@pytest.mark.parametrize("engine", BROKEN, ids=lambda engine: engine.__name__)
def test_broken_engine_is_caught(engine: type[Engine]) -> None:
    report = check_grammar(engine, profile=PATIENT)

    [failed] = [check for check in report.checks if check.outcome == "failed"]
    where, says = BROKEN[engine]
    assert re.fullmatch(where, failed.name), failed
    assert re.search(says, failed.detail), failed.detail
