"""Load: lengths, tokens and times."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.benchmark.workload import (
    Ask,
    TokenRange,
    TraceEntry,
    chat_body,
    completion_body,
    random_asks,
    read_trace,
    trace_asks,
    with_arrivals,
)
from quire.errors import ConfigError

TOKENS = TokenRange(low=10, high=500)
TRACES = Path(__file__).parents[2] / "data/traces"


def replay(entries: list[TraceEntry], scale: float = 1.0, max_len: int | None = None) -> list[Ask]:
    return trace_asks(
        entries, length_scale=scale, speed=2.0, max_len=max_len, tokens=TOKENS, seed=3
    )


def entry(at_s: float, prompt: int, answer: int, *hash_ids: int) -> TraceEntry:
    return TraceEntry(
        at_s=at_s, num_prompt_tokens=prompt, max_tokens=answer, hash_ids=tuple(hash_ids)
    )


@given(
    st.lists(st.tuples(st.integers(0, 10**5), st.integers(0, 10**4)), min_size=1, max_size=20),
    st.floats(0.001, 0.1),
    st.integers(2, 2048),
)
def test_replayed_requests_fit(lengths: list[tuple[int, int]], scale: float, max_len: int) -> None:
    asks = replay([entry(0.0, *pair) for pair in lengths], scale, max_len)

    for ask in asks:
        assert ask.prompt
        assert ask.max_tokens >= 1
        assert len(ask.prompt) + ask.max_tokens <= max_len
        assert all(10 <= token_id < 500 for token_id in ask.prompt)


def test_equal_hash_ids_are_equal_tokens_and_others_are_not() -> None:
    first, second, third = replay(
        [entry(0, 1300, 5, 1, 2, 3), entry(4, 1100, 5, 1, 2, 9), entry(6, 600, 5, 7, 2)]
    )

    assert first.prompt[:1024] == second.prompt[:1024]
    assert first.prompt[1024:1100] != second.prompt[1024:]
    assert first.prompt[:512] != third.prompt[:512]
    assert [len(ask.prompt) for ask in (first, second, third)] == [1300, 1100, 600]
    assert [ask.at_s for ask in (first, second, third)] == [0, 2, 3]


@pytest.mark.parametrize("name", ["azure_conv_2023.csv", "mooncake_conversation.jsonl"])
def test_traces_begin_at_zero_and_go_on(name: str) -> None:
    entries = read_trace(TRACES / name, 500)

    times = [one.at_s for one in entries]
    assert len(entries) == 500
    assert times[0] == 0
    assert times == sorted(times)
    assert all(one.num_prompt_tokens > 0 and one.max_tokens > 0 for one in entries)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.jsonl", "{not json"),
        ("t.jsonl", json.dumps({"timestamp": 0})),
        ("t.jsonl", ""),
        ("t.csv", "a,b\n1,2\n"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n"),
    ],
)
def test_file_that_is_no_trace_is_one_error(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(ConfigError, match=name):
        read_trace(tmp_path / name, 10)


@given(st.floats(0.5, 100), st.floats(0.1, 10))
def test_arrivals_go_on_from_zero(rate: float, burstiness: float) -> None:
    asks = [Ask(at_s=0, prompt=(1,), max_tokens=1)] * 20

    times = [ask.at_s for ask in with_arrivals(asks, rate, burstiness, 1)]

    assert times[0] == 0
    assert times == sorted(times)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    asks = [Ask(at_s=0, prompt=(1,), max_tokens=1)] * 20_000

    times = [ask.at_s for ask in with_arrivals(asks, 50.0, burstiness, 1)]

    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert variance / mean**2 == pytest.approx(1 / burstiness, rel=0.1)


def test_random_requests_share_what_they_should() -> None:
    options = {"input_len": 100, "output_len": 20, "tokens": TOKENS}
    asks = random_asks(50, spread=0.5, shared_prefix_len=7, seed=1, **options)

    assert len({ask.prompt[:7] for ask in asks}) == 1
    assert len({ask.prompt for ask in asks}) == 50
    assert all(57 <= len(ask.prompt) <= 157 and 10 <= ask.max_tokens <= 30 for ask in asks)
    assert asks == random_asks(50, spread=0.5, shared_prefix_len=7, seed=1, **options)


def test_bodies_are_openais() -> None:
    ask = Ask(at_s=0, prompt=(10, 11), max_tokens=3)

    completion = completion_body("m", {"ignore_eos": True})(ask)
    chat = chat_body("m", {})(ask)

    assert completion["prompt"] == [10, 11]
    assert completion["ignore_eos"] is True
    assert chat["messages"][0]["role"] == "user"
    assert len(chat["messages"][0]["content"].split()) == 2
    assert completion["stream_options"] == {"include_usage": True}
