"""The kit passes right parsers of answers, catches broken ones, and says what is wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
from attrs import evolve
from broken_parsers import BROKEN, Plain, Thoughts

from quire.testing import ReasoningParserTests, ToolCallParserTests, check_parser
from quire.testing.kit_report import PROFILES

# As many cases on a slow machine as on a fast one.
PATIENT = evolve(PROFILES["quick"], seconds=60)


class TestPlain(ToolCallParserTests):
    parser = Plain


class TestThoughts(ReasoningParserTests):
    parser = Thoughts


@pytest.mark.parametrize("parser", BROKEN, ids=lambda parser: parser.__name__)
def test_broken_parser_is_caught(parser: type[Any]) -> None:
    report = check_parser(parser, profile=PATIENT)

    [failed] = [check for check in report.checks if check.outcome == "failed"]
    where, says = BROKEN[parser]
    assert re.fullmatch(where, failed.name), failed
    assert re.search(says, failed.detail), failed.detail
