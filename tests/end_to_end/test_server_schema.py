"""schemathesis on the server's own OpenAPI document: no 500, no status that is not documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance
from serving import Server, serving

from quire.server.protocol.openapi import document


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-model-len", "48") as running:
        yield running
        running.wait_until_idle()


OPERATIONS = [(m, path) for path, found in document("", "")["paths"].items() for m in found]


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_documented(schema: Any, method: str, path: str) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy())
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body = {**case.body, "model": "demo"}  # else nearly all are unknown models
        case.call_and_validate(checks=[not_a_server_error, status_code_conformance])

    ask()
