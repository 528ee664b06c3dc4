"""Time attention backends side by side on a GPU: the same queries, cache and block tables.

    python tests/benchmarks/gpu_backends.py [--backends cuda,triton] [--block-size 16]

Heads 32/8 of 128, bfloat16. Each time is the median over replays of a CUDA graph whose launches go
round caches that exceed the L2 cache, on a card that is warm: all backends take turns. `error` is
the largest difference from float64 in rounding units of the largest output; for prompts, which
are too long for that, from the first backend's outputs.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from attrs import evolve, frozen
from gpu_attention import (
    DIM,
    HEADS,
    KV_HEADS,
    ROTATED_BYTES,
    exact,
    make_workload,
    milliseconds,
    print_limits,
)
from torch import Tensor

from quire.interfaces.attention import AttentionBackend, BatchLimits
from quire_attention.cuda.backend import CudaAttention
from quire_attention.triton.backend import TritonAttention

BACKENDS: dict[str, type[AttentionBackend]] = {"cuda": CudaAttention, "triton": TritonAttention}


@frozen
class Shape:
    """`count` sequences of `seq_len` tokens, the last `query_len` of them new.

    Where `shortest` is given, lengths are drawn from there to `seq_len`.
    """

    name: str
    query_len: int
    seq_len: int
    count: int = 1
    shortest: int | None = None

    @property
    def seq_lens(self) -> list[int]:
        if self.shortest is None:
            return [self.seq_len] * self.count
        drawn = torch.Generator().manual_seed(0)
        span = (self.shortest, self.seq_len + 1)
        return torch.randint(*span, (self.count,), generator=drawn).tolist()

    @property
    def is_decode(self) -> bool:
        return self.query_len == 1

    def rate(self, ms: float) -> str:
        """Return the bytes of keys and values, or the operations that are seen, a second."""
        if self.is_decode:
            num_bytes = sum(self.seq_lens) * KV_HEADS * 2 * DIM * 2
            return f"{num_bytes / ms / 1e9:6.2f} TB/s"
        seen = self.query_len * (self.seq_len - (self.query_len - 1) / 2) * self.count
        return f"{4 * HEADS * DIM * seen / ms / 1e9:6.0f} TFLOP/s"


SHAPES = (
    Shape("decode 64 x 4096", 1, 4096, 64),
    Shape("decode 256 x 1024", 1, 1024, 256),
    Shape("decode 256 of 100-2000", 1, 2000, 256, 100),
    Shape("decode 8 x 8192", 1, 8192, 8),
    Shape("decode 1 x 32768", 1, 32768),
    Shape("decode 1 x 8192", 1, 8192),
    Shape("decode 1 x 1024", 1, 1024),
    Shape("prefill 8192", 8192, 8192),
    Shape("prefill 2048", 2048, 2048),
    Shape("prefill 8 x 1024", 1024, 1024, 8),
    Shape("chunk of 512 at 32768", 512, 32768),
    Shape("prefill 32768", 32768, 32768),
)


def measure(shape: Shape, names: list[str], changes: dict[str, Any]) -> bool:
    """Print a shape's line of each backend; False where one is wrong."""
    lens = [shape.query_len] * shape.count, shape.seq_lens
    first = make_workload(*lens, copies_bytes=ROTATED_BYTES, **changes)
    limits = BatchLimits(
        max_num_seqs=shape.count,
        max_num_batched_tokens=sum(lens[0]),
        max_model_len=shape.seq_len,
    )
    want: Tensor | None = exact(first) if shape.is_decode else None
    good = True
    for name in names:
        backend = BACKENDS[name](first.backend.spec, limits, {})
        work = evolve(first, backend=backend, out=torch.full_like(first.out, float("nan")))
        plan = backend.plan(work.batch, 0)
        backend.prepare(plan)
        work.attend(plan, 0)
        want = work.out.double() if want is None else want
        unit = torch.finfo(work.out.dtype).eps * want.abs().max()
        error = ((work.out.double() - want).abs().max() / unit).item()
        taken = milliseconds(lambda turn, work=work, plan=plan: work.attend(plan, turn))
        is_good = error < 2
        good &= is_good
        print(
            f"{shape.name:22} {name:8} {1e3 * taken:9.1f} us {shape.rate(taken)}  "
            f"error {error:5.2f}{'' if is_good else '   <- TOO LARGE'}",
            flush=True,
        )
    return good


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", default="cuda,triton")
    parser.add_argument("--block-size", type=int, default=16)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; run this on a machine that has one.")
    names = arguments.backends.split(",")
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        sys.exit(f"--backends {', '.join(unknown)}: allowed are {', '.join(BACKENDS)}.")
    torch.manual_seed(0)
    print_limits()
    good = [measure(shape, names, {"block_size": arguments.block_size}) for shape in SHAPES]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
