"""The work of a model is counted from its shapes."""

from __future__ import annotations

import pytest

from quire.execution.work import AttentionWork, ModelWork


def pairs(length: int, window: int | None) -> int:
    """Count what the queries of a prompt see, one by one."""
    return sum(min(i + 1, window or length) for i in range(length))


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 100])
def test_prefill_counts_the_keys_that_each_query_sees(window: int | None) -> None:
    work = ModelWork(
        linear_flops=0,
        head_flops=0,
        weight_bytes=0,
        attention=(AttentionWork(flops_per_pair=5, window=window),),
    )

    assert work.prefill_flops(7) == 5 * pairs(7, window)


def test_prefill_counts_layers_for_every_token_and_the_head_once() -> None:
    work = ModelWork(linear_flops=10, head_flops=3, weight_bytes=0, attention=())

    assert work.prefill_flops(4) == 43
