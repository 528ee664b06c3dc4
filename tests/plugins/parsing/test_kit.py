"""The parsers that come with Quire pass the kit."""

from __future__ import annotations

import pytest
from attrs import evolve

from quire.hooks.parser_choice import require_reasoning_parser, require_tool_call_parser
from quire.hooks.registry import load_plugins
from quire.testing import check_parser
from quire.testing.kit_report import PROFILES

SHORT = evolve(PROFILES["quick"], seconds=0.5, examples=100)
REGISTRY = load_plugins()
PARSERS = {
    name: require(REGISTRY, name)
    for kind, require in (
        ("tool-call-parser", require_tool_call_parser),
        ("reasoning-parser", require_reasoning_parser),
    )
    for name in REGISTRY.names(kind)
}


@pytest.mark.parametrize("name", PARSERS)
def test_parser_passes_the_kit(name: str) -> None:
    report = check_parser(PARSERS[name], profile=SHORT)

    assert report.passed, [check.detail for check in report.checks]
