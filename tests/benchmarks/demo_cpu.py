"""Compare Quire with Transformers on the demo model, side by side, on this machine's CPU.

    python tests/benchmarks/demo_cpu.py [--model FOLDER] [--threads N] [--pairs N]

Both run in one process, in turn, on the same prompts; ratios are taken pair by pair, since the
speed of a shared machine drifts. Command times are those of whole processes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

NEW_TOKENS = 64
WORKLOADS = ((1, 32), (32, 128))
COMMANDS = (
    ("generate demo -p hi --max-tokens 16", 6.0),
    ("--help", 1.0),
    ("plugins", 2.0),
)


def main() -> None:
    """Print a table of throughputs and one of start times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="a checkpoint that Transformers loads too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compare(arguments.model, arguments.threads, arguments.pairs)
    time_commands()


def compare(model: str, threads: int, pairs: int) -> None:
    """Print output tokens a second of both, and the median ratio of the pairs."""
    from transformers import AutoModelForCausalLM

    from quire import LLM

    warnings.simplefilter("ignore")
    llm = LLM(model, num_threads=threads, enable_prefix_caching=False)
    folder = llm.frontend.prepared.folder
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    print(f"{folder.name}, {oracle.dtype}, {threads} threads, {NEW_TOKENS} new tokens, greedy")
    print(f"{'sequences':>9} {'prompt':>7} {'Quire tok/s':>12} {'Transformers':>13} {'ratio':>6}")
    for num_seqs, length in WORKLOADS:
        prompts = torch.randint(5, oracle.config.vocab_size, (num_seqs, length))
        ours, theirs = quire_run(llm, prompts), transformers_run(oracle, prompts)
        ours(), theirs()
        measured = [(timed(ours), timed(theirs)) for _ in range(pairs)]
        ratio = statistics.median(b / a for a, b in measured)
        tokens = num_seqs * NEW_TOKENS
        first = tokens / statistics.median(a for a, _ in measured)
        second = tokens / statistics.median(b for _, b in measured)
        print(f"{num_seqs:>9} {length:>7} {first:>12.0f} {second:>13.0f} {ratio:>6.2f}")


def quire_run(llm: object, prompts: torch.Tensor) -> Callable[[], None]:
    """Return a run of Quire on the prompts."""
    from quire import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    items = [{"prompt_token_ids": row} for row in prompts.tolist()]
    return lambda: llm.generate(items, params, use_tqdm=False)  # type: ignore[attr-defined]


def transformers_run(oracle: torch.nn.Module, prompts: torch.Tensor) -> Callable[[], None]:
    """Return a run of Transformers on the prompts."""
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    mask = torch.ones_like(prompts)
    return lambda: oracle.generate(prompts, attention_mask=mask, pad_token_id=0, **options)


def timed(run: Callable[[], None]) -> float:
    """Return the seconds of one run."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def time_commands() -> None:
    """Print how long whole commands take, against what they may take."""
    quire = Path(sys.executable).with_name("quire")
    print(f"\n{'command':<45} {'seconds':>8} {'at most':>8}")
    for command, limit in COMMANDS:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            subprocess.run([quire, *command.split()], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begin)
        print(f"{'quire ' + command:<45} {statistics.median(times):>8.2f} {limit:>8.1f}")


if __name__ == "__main__":
    main()
