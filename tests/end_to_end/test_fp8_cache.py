"""An fp8 KV cache in whole engines: what a sequence is given does not change its answer.

The demo's tokens are far apart: where sums differ in the last bit a stored number may become its
neighbour, which makes the tokens of a random model others.
"""

from __future__ import annotations

from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.cli.main import main
from quire.errors import ConfigError

PROMPTS = [
    "Good morning! I would like a large latte with oat milk and two extra shots of espresso,",
    "Hi there, could I get a small cappuccino with skim milk, please? And for my friend a",
    "Hello, I am calling to order a medium mocha with whipped cream on top of it, and",
    "I'd like to have an iced americano, the biggest that you have, and with no",
]
OPTIONS: dict[str, Any] = {
    **{"kv_cache_dtype": "fp8", "dtype": "float32", "num_threads": 1, "max_num_seqs": 4},
    **{"kv_cache_memory_bytes": 16 << 20, "max_model_len": 128},
}
BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "prefill=reference,decode=sdpa"])


def open_llm(backend: str, **options: Any) -> LLM:
    return LLM("demo", attention_backend=backend, **{**OPTIONS, **options})


def texts_of(llm: LLM, prompts: list[str]) -> list[str]:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    return [out.outputs[0].text for out in llm.generate(prompts, params, use_tqdm=False)]


@BACKENDS
def test_chunks_and_cached_prefixes_give_the_answer_of_a_whole_prompt(backend: str) -> None:
    """What a prompt reads of its own step are stored numbers too, however it is cut."""
    whole = texts_of(open_llm(backend, enable_prefix_caching=False), PROMPTS[:2])
    cut = open_llm(backend, max_num_batched_tokens=7)

    assert texts_of(cut, PROMPTS[:2]) == whole
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    again = cut.generate(PROMPTS[:2], params, use_tqdm=False)
    assert [out.outputs[0].text for out in again] == whole
    assert all(out.num_cached_tokens >= 16 for out in again)


@BACKENDS
def test_preempted_sequences_give_the_answers_of_lone_ones(backend: str) -> None:
    roomy = open_llm(backend, enable_prefix_caching=False)
    alone = [texts_of(roomy, [prompt])[0] for prompt in PROMPTS]
    a_block = 16 * 1536
    tight = open_llm(backend, enable_prefix_caching=False, kv_cache_memory_bytes=10 * a_block)

    assert texts_of(tight, PROMPTS) == alone
    assert tight.engine.scheduler.num_preemptions > 0


def test_cache_takes_half_of_what_bfloat16_takes() -> None:
    narrow, wide = (
        open_llm("sdpa", dtype="bfloat16", kv_cache_dtype=name) for name in ("fp8", "auto")
    )

    sizes = [llm.engine.layout.groups[0].bytes_per_block for llm in (narrow, wide)]

    assert 2 * sizes[0] == sizes[1]


def test_backend_that_does_not_declare_the_cache_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        open_llm("cpu")

    assert "--attention-backend cpu cannot be used: it has no float8_e4m3fn KV cache: its" in str(
        caught.value
    )


def test_explain_tells_the_bytes_and_where_scales_come_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["explain", "demo", "--kv-cache-dtype", "fp8", "--device", "cpu"]) == 0

    # 6 layers, 2 KV heads of 64, a key and a value each.
    line = "KV cache of float8_e4m3fn, 1,536 bytes a token; scales: one a head, calibrated at"
    assert line in capsys.readouterr().out
