"""Figures of runs of an engine: what is divided by what."""

from __future__ import annotations

import pytest

from quire.benchmark.engine_run import EngineRun
from quire.benchmark.figures import latency_figures, offline_figures, prefill_figures, spread
from quire.benchmark.prompts import Lengths, check_fits, draw_lengths, draw_prompts
from quire.benchmark.report import add_shares, reached
from quire.errors import ConfigError
from quire.execution.work import ModelWork

WORK = ModelWork(linear_flops=10**9, head_flops=10**9, weight_bytes=4 * 10**9, attention=())


def run() -> EngineRun:
    """Two sequences that get 3 tokens each: prompts in one step, then two steps of one token."""
    return EngineRun(
        took_s=2.0,
        num_prompt_tokens=14,
        token_s={"a": [0.5, 1.0, 1.5], "b": [0.6, 1.2, 1.8]},
        host_s=[0.010, 0.001, 0.003],
        num_seqs=[2, 2, 2],
        num_step_tokens=[14, 2, 2],
    )


def test_offline_throughput_counts_generated_tokens_and_those_of_prompts() -> None:
    found = offline_figures(run(), WORK, on_gpu=False)

    assert found["output_tokens_per_s"] == 3
    assert found["total_tokens_per_s"] == 10
    assert found["step_ms"] == pytest.approx(2000 / 3)
    assert found["tflop_per_s"] == pytest.approx((20 + 6) * 1e9 / 2 / 1e12)
    assert "host_ms" not in found


def test_host_time_of_full_steps_leaves_prompts_out() -> None:
    found = offline_figures(run(), WORK, on_gpu=True)

    assert found["host_ms"] == pytest.approx(14 / 3)
    assert found["host_ms_full"] == pytest.approx(2)


def test_latency_waits_for_the_slowest_sequence() -> None:
    found = latency_figures(run(), Lengths(low=1, high=3), WORK)

    assert found["ttft_ms"] == pytest.approx(600)
    assert found["ms_per_token"] == pytest.approx(600)
    assert found["weights_gb_per_s"] == pytest.approx(4 / 0.6)


def test_prefill_divides_flops_by_time() -> None:
    found = prefill_figures(run(), WORK)

    assert found["tokens_per_s"] == 7
    assert found["tflop_per_s"] == pytest.approx(15e9 / 2 / 1e12)


def test_spread_has_median_lowest_and_highest() -> None:
    found = spread([{"x": 3.0}, {"x": 1.0}, {"x": 2.0}])

    assert found == {"x": {"median": 2.0, "low": 1.0, "high": 3.0, "values": [3.0, 1.0, 2.0]}}


def test_share_of_a_ceiling_is_in_the_same_unit() -> None:
    ceilings = {"one_row_tb_per_s": 4.0, "product_tflop_per_s": 700.0, "copy_tb_per_s": 4.0}

    found = reached("latency", {"weights_gb_per_s": {"median": 3000.0}}, ceilings)

    assert found["share"] == 0.75


def test_row_of_a_profile_is_compared_with_the_nearer_ceiling() -> None:
    ceilings = {"product_tflop_per_s": 700.0, "copy_tb_per_s": 4.0}
    rows = [
        {"tflop_per_s": 350.0, "gb_per_s": 400.0},
        {"tflop_per_s": 7.0, "gb_per_s": 3000.0},
        {"tflop_per_s": None, "gb_per_s": None},
    ]

    add_shares(rows, ceilings)

    assert [row.get("of_ceiling") for row in rows] == [0.5, 0.75, None]


@pytest.mark.parametrize(("text", "low", "high"), [("7", 7, 7), ("3:9", 3, 9)])
def test_lengths_are_one_number_or_a_range(text: str, low: int, high: int) -> None:
    assert Lengths.parse(text) == Lengths(low=low, high=high)
    assert str(Lengths.parse(text)) == text


@pytest.mark.parametrize("text", ["", "0", "9:3", "a:b", "1:", ":4", "-1:4", "1:2:3"])
def test_lengths_of_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  any message: the option's is its own
        Lengths.parse(text)


def test_prompts_have_the_lengths_and_ids_of_the_vocabulary() -> None:
    lengths = draw_lengths(50, Lengths(low=2, high=5), Lengths(low=1, high=3), 0)

    works = draw_prompts(lengths, vocab_size=7, seed="0")

    assert [(len(w.prompt), w.num_tokens) for w in works] == lengths
    assert {len(w.prompt) for w in works} == {2, 3, 4, 5}
    assert {i for w in works for i in w.prompt} == set(range(7))
    assert works != draw_prompts(lengths, vocab_size=7, seed="1")


def test_request_that_is_longer_than_the_context_is_refused() -> None:
    check_fits([(3, 5), (4, 4)], 8)
    with pytest.raises(ConfigError, match="a request has 9 tokens"):
        check_fits([(3, 5), (4, 5)], 8)
