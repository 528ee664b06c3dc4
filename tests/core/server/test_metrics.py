"""The figures are those that the documents explain and that the dashboard draws."""

from __future__ import annotations

import json
import re
from pathlib import Path

from attrs import define

from quire.server.messages import StepStats
from quire.server.metrics import ServerMetrics

DOCS = Path(__file__).parents[3] / "docs"
NAME = re.compile(r"\b(?:vllm|quire):[a-z0-9_]+")


def exported() -> set[str]:
    """Return the names that Prometheus sees, without the parts of histograms."""
    text = ServerMetrics("m").render()[0].decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.M))
    return {name for name in kinds if not name.endswith("_created")}


def figure(metrics: ServerMetrics, line: str) -> float:
    found = re.search(rf"^{re.escape(line)} (\S+)$", metrics.render()[0].decode(), re.M)
    assert found, line
    return float(found[1])


def test_every_figure_is_explained_and_nothing_else() -> None:
    rows = re.findall(r"^\| `((?:vllm|quire):\w+)` \|", (DOCS / "serving.md").read_text(), re.M)

    assert sorted(rows) == sorted(exported())


def test_the_dashboard_draws_every_figure_and_nothing_else() -> None:
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    drawn = {
        name.removesuffix("_bucket")
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in NAME.findall(target["expr"])
    }

    assert drawn == exported()


def test_counters_go_on_when_an_engine_begins_again() -> None:
    metrics = ServerMetrics("m")
    for hits in (10, 25, 5):  # the third is a fresh engine
        metrics.step(StepStats(prefix_hit_tokens=hits))

    assert figure(metrics, 'vllm:prefix_cache_hits_total{model_name="m"}') == 30


def test_usage_is_the_share_of_blocks() -> None:
    metrics = ServerMetrics("m")
    metrics.step(StepStats(num_used_blocks=3, num_blocks=12))

    assert figure(metrics, 'vllm:kv_cache_usage_perc{model_name="m"}') == 0.25


@define
class Generated:
    """What a record says of a request that generated."""

    route: str = "/v1/completions"
    outcome: str = "ok"
    generation: object = object()
    prompt_tokens: int = 7
    generated_tokens: int = 5
    finish_reasons: tuple[str, ...] = ("stop",)
    arrival_s: float = 1.0
    scheduled_s: float = 1.5
    first_token_s: float = 2.0
    seconds_per_token: float = 0.25
    finished_s: float = 4.0


def test_a_request_is_counted_once_with_its_times() -> None:
    metrics = ServerMetrics("m")

    metrics.request_finished(Generated())

    label = '{model_name="m"}'
    assert figure(metrics, f"vllm:generation_tokens_total{label}") == 5
    assert figure(metrics, f"vllm:time_to_first_token_seconds_sum{label}") == 1.0
    assert figure(metrics, f"vllm:request_queue_time_seconds_sum{label}") == 0.5
    assert figure(metrics, f"vllm:e2e_request_latency_seconds_sum{label}") == 3.0
    each = f"vllm:request_time_per_output_token_seconds_sum{label}"
    assert figure(metrics, each) == 0.25
    assert figure(metrics, 'vllm:request_success_total{finished_reason="stop",model_name="m"}') == 1
