"""Figures of a run that is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.benchmark.load import Result, Run
from quire.benchmark.summary import as_table, meets, parse_goodput, percentile, summarize
from quire.errors import ConfigError


def result(sent_s: float, *chunk_s: float, error: str | None = None) -> Result:
    return Result(
        sent_s=sent_s,
        chunk_s=list(chunk_s),
        end_s=chunk_s[-1] if chunk_s else sent_s,
        num_prompt_tokens=10,
        num_tokens=2 * len(chunk_s),  # two tokens a chunk
        finish_reason="stop",
        error=error,
    )


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.01, 1.0))
def test_percentile_is_the_smallest_that_covers_the_share(
    values: list[float], share: float
) -> None:
    found = percentile(values, share)

    assert found in values
    assert sum(v <= found for v in values) >= share * len(values) - 1e-9
    assert sum(v < found for v in values) < share * len(values) + 1e-9


def test_figures_of_a_known_run() -> None:
    good = result(1.0, 1.5, 2.0, 2.5)
    run = Run(results=[good, result(0.0, error="503: full")], took_s=2.0)

    figures = summarize(run, {"ttft": 0.6})

    assert (figures["answered"], figures["failed"]) == (1, 1)
    assert figures["errors"] == {"503: full": 1}
    assert figures["output_tokens_per_s"] == 3.0
    assert figures["ttft_ms"]["p50"] == 500.0
    assert figures["tpot_ms"]["p99"] == pytest.approx(200.0)  # 1 s for five tokens
    assert figures["itl_ms"]["p90"] == 500.0
    assert figures["e2e_ms"]["mean"] == 1500.0
    assert figures["goodput_share"] == 0.5
    assert "1 x 503: full" in as_table(figures)


def test_run_without_an_answer_has_no_latencies() -> None:
    figures = summarize(Run(results=[result(0.0, error="x")], took_s=1.0), {})

    assert figures["ttft_ms"] is None
    assert "goodput_share" not in figures
    assert as_table(figures)


def test_goodput_needs_every_limit() -> None:
    limits = parse_goodput(["ttft:500", "tpot:200", "e2e:1600"])

    assert limits == {"ttft": 0.5, "tpot": 0.2, "e2e": 1.6}
    assert meets(result(1.0, 1.5, 2.0, 2.5), limits)
    assert not meets(result(0.9, 1.5, 2.0, 2.5), limits)
    assert not meets(result(1.0, 1.5, 2.0, 2.6), limits)


@pytest.mark.parametrize("text", ["x:1", "ttft", "ttft:", "ttft:x", "ttft:-1", "ttft:nan", ":5"])
def test_wrong_goodput_is_one_error(text: str) -> None:
    with pytest.raises(ConfigError, match="--goodput"):
        parse_goodput([text])
