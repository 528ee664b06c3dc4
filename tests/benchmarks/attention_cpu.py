"""Time the attention backends of a CPU on the same batches, side by side, on this machine.

    python tests/benchmarks/attention_cpu.py [--threads N] [--rounds N]

The backends take turns, since the speed of a shared machine drifts; ratios are medians over rounds.
`write` is not timed. Bandwidth counts keys and values once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from attrs import frozen

from quire.interfaces.attention import AttentionBackend, AttentionSpec, BatchLimits
from quire.testing.attention_cases import Layer, make_batch, make_spec
from quire_attention.cpu.backend import CpuAttention
from quire_attention.reference.backend import ReferenceAttention
from quire_attention.sdpa.backend import SdpaAttention

BACKENDS = {"cpu": CpuAttention, "sdpa": SdpaAttention, "reference": ReferenceAttention}
LIMITS = BatchLimits(max_num_seqs=64, max_num_batched_tokens=8192, max_model_len=8192)
BLOCK_SIZE = 16


@frozen
class Workload:
    """So many sequences of `length` tokens, the last `query_len` of which are attended."""

    name: str
    num_seqs: int
    query_len: int
    length: int
    heads: tuple[int, int]
    head_dim: int
    dtype: str = "bfloat16"


LARGE, DEMO = ((32, 8), 128), ((4, 2), 64)
WORKLOADS = (
    Workload("decode, 32/8 heads of 128", 16, 1, 2048, *LARGE),
    Workload("the same in float32", 16, 1, 2048, *LARGE, "float32"),
    Workload("decode, 4/2 heads of 64", 16, 1, 2048, *DEMO),
    Workload("decode, 4/2 heads of 64", 32, 1, 160, *DEMO),
    Workload("decode, 32/8 heads of 128", 1, 1, 2048, *LARGE),
    Workload("prompt, 32/8 heads of 128", 1, 1024, 1024, *LARGE),
    Workload("chunk, 32/8 heads of 128", 1, 512, 4096, *LARGE),
    Workload("prompts, 4/2 heads of 64", 32, 128, 128, *DEMO),
)


def main() -> None:
    """Print a line a workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads; reading a large tensor: {read_speed():.1f} GB/s")
    print(f"{'workload':<28} {'batch':>5} {'context':>7} {'cpu ms':>8} {'GB/s':>6} sdpa, reference")
    for work in WORKLOADS:
        runs = {name: run_of(kind, work) for name, kind in BACKENDS.items()}
        times = [{name: timed(run) for name, run in runs.items()} for _ in range(arguments.rounds)]
        own = statistics.median(each["cpu"] for each in times)
        ratios = [statistics.median(e[n] / e["cpu"] for e in times) for n in ("sdpa", "reference")]
        told = f"{own * 1e3:>8.3f} {kv_bytes(work) / own / 1e9:>6.1f}"
        shape = f"{work.name:<28} {work.num_seqs:>5} {work.length:>7}"
        print(shape, told, ", ".join(f"{ratio:.1f}x" for ratio in ratios), flush=True)


def read_speed() -> float:
    """Return what summing half a gigabyte reads in a second, in GB."""
    large = torch.ones(1 << 27)
    return large.nbytes / min(timed(large.sum) for _ in range(7)) / 1e9


def kv_bytes(work: Workload) -> int:
    """Return the bytes of a batch's keys and values."""
    element = 4 if work.dtype == "float32" else 2
    return work.num_seqs * work.length * work.heads[1] * 2 * work.head_dim * element


def spec_of(work: Workload) -> AttentionSpec:
    """Return what a model of these heads asks for."""
    return make_spec(
        num_heads=work.heads[0],
        num_kv_heads=work.heads[1],
        head_dim=work.head_dim,
        value_head_dim=work.head_dim,
        scale=work.head_dim**-0.5,
        dtype=work.dtype,
        kv_dtype=work.dtype,
        block_size=BLOCK_SIZE,
    )


def run_of(kind: type[AttentionBackend], work: Workload) -> Callable[[], None]:
    """Return a run of a backend over a shuffled cache, warmed up."""
    spec, dtype = spec_of(work), getattr(torch, work.dtype)
    per_seq = -(-work.length // BLOCK_SIZE)
    order = (torch.randperm(work.num_seqs * per_seq) + 1).view(work.num_seqs, per_seq)
    span = (work.length - work.query_len, work.length)
    batch = make_batch([span] * work.num_seqs, order.tolist(), BLOCK_SIZE)
    num_tokens = work.num_seqs * work.query_len
    q = torch.randn(num_tokens, work.heads[0], work.head_dim).to(dtype)
    k, v = torch.randn(2, num_tokens, work.heads[1], work.head_dim).to(dtype)
    shape = (work.num_seqs * per_seq + 1, *kind.kv_layout(spec).block_shape)
    cache, out, layer = torch.randn(shape).to(dtype), torch.empty_like(q), Layer()
    backend = kind(spec, LIMITS, {})
    plan = backend.plan(batch, 0)

    def run() -> None:
        backend.attend(layer, q, k, v, cache, plan, out)

    run()
    return run


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of one run."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
