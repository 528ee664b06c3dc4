"""The work of a model is counted from its shapes."""

from __future__ import annotations

import pytest
import torch

from quire.execution.setup import weight_bytes
from quire.execution.work import AttentionWork, ModelWork, work_of
from quire.layers.build import LayerBuilder
from quire_models.mixtral import MixtralConfig
from quire_models.mixtral.model import Mixtral
from quire_quant.none.method import NoQuantization


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


def test_experts_count_as_often_as_a_token_has_them() -> None:
    config = MixtralConfig.from_json(
        {
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    )
    plain = NoQuantization({})
    builder = LayerBuilder(
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_len=32,
        quantization=plain,
        dense=plain,
    )
    model = Mixtral(config, builder)

    work = work_of(model, [], weight_bytes(model))

    attention, router, expert = 4 * 16 * 16, 8 * 16, 3 * 16 * 24
    assert work.linear_flops == 2 * 2 * (attention + router + 2 * expert)
    norms = 5 * 16
    read = 2 * (attention + router + 2 * expert) + norms + 50 * 16
    assert work.weight_bytes == 4 * read
