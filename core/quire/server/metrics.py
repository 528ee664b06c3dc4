"""Figures for Prometheus: vLLM's names where the meaning is the same, `quire:` for our own."""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from quire.server.messages import StepStats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
# Name, attribute of the engine's StepStats, what it says.
GAUGES = (
    ("vllm:num_requests_running", "num_running", "sequences that have a row and blocks"),
    ("vllm:num_requests_waiting", "num_waiting", "sequences that wait for a row or for blocks"),
    ("quire:kv_blocks_used", "num_used_blocks", "KV blocks that running sequences hold"),
    ("quire:kv_blocks", "num_blocks", "KV blocks that there are"),
)
# These run from the engine's start; a restart begins again at 0.
COUNTERS = (
    ("vllm:prefix_cache_queries", "prefix_query_tokens", "prompt tokens looked up"),
    ("vllm:prefix_cache_hits", "prefix_hit_tokens", "prompt tokens found"),
    ("vllm:num_preemptions", "num_preemptions", "sequences that gave their blocks back"),
)


class ServerMetrics:
    """One server's figures, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._gauges = {a: self._gauge(name, text) for name, a, text in GAUGES}
        self._usage = self._gauge("vllm:kv_cache_usage_perc", "share of the KV blocks in use")
        self._counters = {a: self._counter(name, text) for name, a, text in COUNTERS}
        self._stats = StepStats()
        self._gpu_stats: StepStats | None = None
        self._counted = dict.fromkeys(self._counters, 0)  # since the last reading
        self._gpu = self._gauge("quire:gpu_memory_bytes", "device memory", "kind")
        self._gpu_use = self._gauge("quire:gpu_utilization_ratio", "time that kernels ran")
        self._prompt = self._counter("vllm:prompt_tokens", "tokens of prompts")
        self._generated = self._counter("vllm:generation_tokens", "tokens generated")
        self._success = self._counter(
            "vllm:request_success", "sequences that ended, by reason", "finished_reason"
        )
        self._requests = self._counter("quire:requests", "HTTP requests", "route", "outcome")
        self._errors = self._counter("quire:errors", "errors", "kind")
        self._restarts = self._counter("quire:engine_restarts", "engines started again")
        self._first = self._seconds("vllm:time_to_first_token_seconds", "from arrival")
        self._each = self._seconds(
            "vllm:request_time_per_output_token_seconds", "mean of a request, after the first"
        )
        self._whole = self._seconds("vllm:e2e_request_latency_seconds", "from arrival to the end")
        self._queued = self._seconds("vllm:request_queue_time_seconds", "before the first step")
        self._prompt_sizes = self._sizes("vllm:request_prompt_tokens", "tokens of a prompt")
        self._answer_sizes = self._sizes("vllm:request_generation_tokens", "tokens of an answer")
        tokens = self._sizes("vllm:iteration_tokens_total", "tokens of a step")
        seqs = self._sizes("quire:batch_sequences", "sequences of a step")
        step = self._seconds("quire:step_seconds", "a step")
        host = self._seconds("quire:step_host_seconds", "the host's work in a step")
        self._observe_tokens = tokens.labels(**self._labels).observe
        self._observe_seqs = seqs.labels(**self._labels).observe
        self._observe_step = step.labels(**self._labels).observe
        self._observe_host = host.labels(**self._labels).observe

    def step(self, stats: StepStats) -> None:
        """Take in where the engine stands after a step: many times a second."""
        now, before = stats, self._stats
        # Counts go on from where an engine that ended left them.
        for attribute in self._counted:
            value, last = getattr(now, attribute), getattr(before, attribute)
            self._counted[attribute] += value - last if value >= last else value
        self._stats = stats
        if stats.gpu_memory_total is not None:
            self._gpu_stats = stats
        if stats.num_tokens:
            self._observe_tokens(stats.num_tokens)
            self._observe_seqs(stats.num_seqs)
            self._observe_step(stats.step_time_s)
            self._observe_host(stats.host_time_s)

    def _set_figures(self) -> None:
        """Bring gauges and counters up to date: once a reading, not once a step."""
        stats, labels = self._stats, self._labels
        for attribute, gauge in self._gauges.items():
            gauge.labels(**labels).set(getattr(stats, attribute))
        usage = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
        self._usage.labels(**labels).set(usage)
        for attribute, counter in self._counters.items():
            counter.labels(**labels).inc(self._counted[attribute])
            self._counted[attribute] = 0
        gpu = self._gpu_stats
        if gpu is not None:
            self._gpu.labels(kind="used", **labels).set(gpu.gpu_memory_used or 0)
            self._gpu.labels(kind="total", **labels).set(gpu.gpu_memory_total or 0)
            if gpu.gpu_utilization is not None:
                self._gpu_use.labels(**labels).set(gpu.gpu_utilization)

    def request_finished(self, record: Any) -> None:
        """Take in an HTTP request whose answer has ended."""
        labels = self._labels
        self._requests.labels(route=record.route, outcome=record.outcome, **labels).inc()
        if record.generation is None:
            return
        self._prompt.labels(**labels).inc(record.prompt_tokens)
        self._generated.labels(**labels).inc(record.generated_tokens)
        self._prompt_sizes.labels(**labels).observe(record.prompt_tokens)
        self._answer_sizes.labels(**labels).observe(record.generated_tokens)
        for reason in record.finish_reasons:
            self._success.labels(finished_reason=reason, **labels).inc()
        self._whole.labels(**labels).observe(record.finished_s - record.arrival_s)
        if record.scheduled_s is not None:
            self._queued.labels(**labels).observe(record.scheduled_s - record.arrival_s)
        if record.first_token_s is not None:
            self._first.labels(**labels).observe(record.first_token_s - record.arrival_s)
        if (per_token_s := record.seconds_per_token) is not None:
            self._each.labels(**labels).observe(per_token_s)

    def error(self, kind: str) -> None:
        """Count an error."""
        self._errors.labels(kind=kind, **self._labels).inc()

    def engine_restarted(self) -> None:
        """Count an engine that was started again."""
        self._restarts.labels(**self._labels).inc()

    def render(self) -> tuple[bytes, str]:
        """Return the figures and their content type."""
        self._set_figures()
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _names(self, more: tuple[str, ...] = ()) -> list[str]:
        return ["model_name", *more]

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, self._names(labels), registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, self._names(labels), registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, self._names(), buckets=SECONDS, registry=self.registry)

    def _sizes(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, self._names(), buckets=TOKENS, registry=self.registry)
