"""Graphs, steps in flight and prefix hits on a GPU: the same tokens as without, block for block.

Run on a machine that has one with `pytest -m gpu tests/end_to_end/test_gpu_graphs.py`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from tiny_llama import has_all_blocks

from quire.config import EngineConfig
from quire.engine import Engine
from quire.frontend import Frontend
from quire.request import Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_REQUESTS = 5000
SOAK: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "block_size": 4,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "gpu_memory_utilization": 0.2,
    # Blocks for a third of what runs at once, so that some are preempted.
    "kv_cache_memory_bytes": 500 * 4 * 2 * 2 * 2 * 16 * 4,
    "max_model_len": 128,
}
Tokens = dict[str, list[int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = tmp_path_factory.mktemp("llama")
    return tiny_llama.write_folder(folder, hidden_size=64, max_position_embeddings=128)


def make_engine(folder: Path, **options: Any) -> Engine:
    config = EngineConfig.from_options({"model": str(folder), **SOAK, **options})
    return Engine(Frontend(config).prepared)


def random_requests(rng: random.Random, count: int) -> list[Request]:
    """Prompts with common beginnings, greedy, of random lengths."""
    beginnings = [[rng.randrange(101) for _ in range(40)] for _ in range(8)]
    found = []
    for number in range(count):
        prompt = rng.choice(beginnings)[: rng.randrange(41)]
        prompt = [*prompt, *(rng.randrange(101) for _ in range(rng.randint(1, 30)))]
        found.append(
            Request(
                request_id=f"r{number}",
                prompt_token_ids=tuple(prompt),
                params=SamplingParams(temperature=0, max_tokens=50),
                max_tokens=rng.randint(1, 40),
                seed=number,
            )
        )
    return found


def run(engine: Engine, requests: list[Request], aborted: set[str]) -> Tokens:
    """Run all, a few more queued at each step; `aborted` end after their second token."""
    tokens: Tokens = {}
    waiting = list(reversed(requests))
    while waiting or engine.has_unfinished():
        for _ in range(min(len(waiting), 8)):
            engine.add_request(waiting.pop())
        for update in engine.step():
            own = tokens.setdefault(update.request_id, [])
            own += update.token_ids
            if update.request_id in aborted and len(own) >= 2:
                engine.abort(update.request_id)
    return tokens


@pytest.mark.slow
def test_5000_requests_give_the_tokens_of_a_plain_engine(folder: Path) -> None:
    rng = random.Random(7)
    requests = random_requests(rng, NUM_REQUESTS)
    aborted = {request.request_id for request in requests if rng.random() < 0.1}
    plain = make_engine(folder, enforce_eager=True, enable_prefix_caching=False)
    plain._depth = 1
    wanted = run(plain, requests, set())
    engine = make_engine(folder)
    assert engine.runner.decode_graphs is not None
    assert engine.runner.mixed_graphs is not None
    assert plain.runner.decode_graphs is plain.runner.mixed_graphs is None

    found = run(engine, requests, aborted)

    assert engine.scheduler.num_preemptions > 0
    assert engine.runner.decode_graphs.num_captured > 8
    assert engine.runner.mixed_graphs.num_captured > 8
    assert has_all_blocks(engine)
    different = []
    for request_id, tokens in found.items():
        expected = wanted[request_id]
        if request_id in aborted:
            expected = expected[: len(tokens)]
        if tokens != expected:
            different.append(request_id)
    # Weights are random, and no two scores lie so close that float32 cannot tell them apart.
    assert different == []


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_replayed_steps_in_bfloat16_give_the_tokens_of_eager_ones(
    folder: Path, temperature: float, kv_cache_dtype: str
) -> None:
    params = {"temperature": temperature, "seed": 3}
    found = []
    for options in ({}, {"enforce_eager": True}):
        options = {"kv_cache_dtype": kv_cache_dtype, "dtype": "bfloat16", **options}
        engine = make_engine(folder, **options)
        one = tiny_llama.request(1, tiny_llama.prompt(1, 9), max_tokens=60, **params)
        found.append(tiny_llama.run_all(engine, [one])[0])

    assert found[0] == found[1]


def test_replayed_steps_in_e4m3_give_the_tokens_of_eager_ones(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 128}
    folder = tiny_llama.write_folder(tmp_path, **sizes)
    found = []
    for options in ({}, {"enforce_eager": True}):
        engine = make_engine(folder, dtype="bfloat16", quantization="fp8", **options)
        three = [
            tiny_llama.request(i, tiny_llama.prompt(i, 9 + i), max_tokens=40, temperature=0.0)
            for i in range(3)
        ]
        alone = [tiny_llama.request(3, tiny_llama.prompt(3, 20), max_tokens=40, temperature=0.0)]
        found.append([tiny_llama.run_all(engine, some)[0] for some in (three, alone)])

    assert found[0] == found[1]
