"""Time steps of bfloat16 and int8 in turn, so that both see the same machine.

    python tests/benchmarks/int8_cpu.py [--steps N] [--threads N] [--methods NAME ...]

Of other methods, such as int4, too.

The model has Qwen3-0.6B's shape and random weights; one sequence, one token a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from gpu import QWEN3

from quire import LLM
from quire.request import SamplingParams

WARM_UP_STEPS = 10
IN_TURN = 4  # steps of one before the other's


def start(folder: str, name: str, threads: int, tokens: int) -> LLM:
    """Load and queue the one request."""
    llm = LLM(
        folder,
        load_format="dummy",
        quantization=name,
        num_threads=threads,
        skip_tokenizer_init=True,
        max_model_len=1024,
        kv_cache_memory_bytes=256 << 20,
    )
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(100, 164))}
    llm.engine.add_request(
        llm.frontend.inputs.process(prompt, params, request_id=name, arrival_s=0.0)
    )
    return llm


def main() -> None:
    """Print the time of a step, low to high, and how many times one is the other's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["int8"])
    arguments = parser.parse_args()
    names = ("none", *arguments.methods)
    folder = tempfile.mkdtemp()
    (Path(folder) / "config.json").write_text(json.dumps(QWEN3))
    num_steps = arguments.steps + WARM_UP_STEPS
    llms = {name: start(folder, name, arguments.threads, num_steps + 1) for name in names}
    took: dict[str, list[float]] = {name: [] for name in names}
    for begin in range(0, num_steps, IN_TURN):
        for name, llm in llms.items():
            for _ in range(begin, min(num_steps, begin + IN_TURN)):
                begun = time.perf_counter()
                llm.engine.step()
                took[name].append((time.perf_counter() - begun) * 1e3)
    shares = {}
    for name, times in took.items():
        tenths = statistics.quantiles(times[WARM_UP_STEPS:], n=10)
        shares[name] = tenths
        ms = f"10% {tenths[0]:.2f}, 50% {tenths[4]:.2f}, 90% {tenths[8]:.2f}"
        print(f"{name:<16} ms a step: {ms}")
    for name in arguments.methods:
        for place, words in ((0, "10%"), (4, "50%")):
            ratio = shares["none"][place] / shares[name][place]
            print(f"bfloat16 by {name}, {words}: {ratio:.2f}")


if __name__ == "__main__":
    main()
