"""Time the attention kernels on a GPU, over tile sizes, beside the card's own limits.

    python tests/benchmarks/gpu_attention.py [--only decode|prefill|write] [--seconds N]

Heads 32/8 of 128, bfloat16, blocks of 16. First outputs are compared with float64. Each time is the
median over replays of a CUDA graph whose launches go round inputs that exceed the L2 cache. A
configuration that fails prints its error, and the next one runs. The best of each workload is
marked; `*` is what `tuning_for` chooses.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from attrs import define, evolve
from torch import Tensor

from quire.interfaces.attention import AttentionSpec, BatchLimits
from quire.interfaces.batch import Batch, GroupBatch
from quire_attention.triton.backend import TritonAttention
from quire_attention.triton.tuning import Tile, Tuning, tuning_for
from quire_kernels import ops

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
ROTATED_BYTES = 256 << 20
DECODES = ((64, 4096), (1, 1024), (1, 8192), (1, 32768), (8, 8192), (256, 1024))
# Sequences of 100 to 2,000 tokens, as in the middle of a run of many requests.
RAGGED = (12, 32, 128, 256)
PROMPTS = (8192, 2048)
DEFAULT = tuning_for(group=HEADS // KV_HEADS, dim=DIM, itemsize=2)
# (block_n, num_warps, num_stages), (few_per_sm, few_chunk, most_per_sm, chunk)
SINGLE = (
    ((64, 4, 4), (2, 64, 4, 1024)),
    ((64, 4, 3), (2, 64, 4, 1024)),
    ((64, 4, 4), (2, 64, 4, 512)),
    ((64, 4, 4), (2, 64, 2, 512)),
    ((64, 4, 3), (2, 64, 4, 512)),
    ((64, 8, 4), (2, 64, 4, 1024)),
)
# (block_m, block_n, num_warps, num_stages)
MANY = (
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 128, 4, 2),
    (128, 64, 4, 3),
    (128, 32, 8, 4),
)


@define
class Layer:
    """What the backend reads of a layer."""

    index: int = 0
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None


@define
class Workload:
    """A batch, and copies of its cache to go round; queries and outputs are small."""

    backend: TritonAttention
    batch: Batch
    q: Tensor
    caches: list[Tensor]
    out: Tensor

    def attend(self, plan: Any, turn: int) -> None:
        cache = self.caches[turn % len(self.caches)]
        self.backend.attend(Layer(), self.q, self.q, self.q, cache, plan, self.out)


def make_spec(**changes: Any) -> AttentionSpec:
    values: dict[str, Any] = {
        **{"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "value_head_dim": DIM},
        **{"scale": DIM**-0.5, "dtype": "bfloat16", "kv_dtype": "bfloat16"},
        **{"block_size": BLOCK, "device": "cuda"},
    }
    return AttentionSpec(**{**values, **changes})


def make_workload(
    query_lens: list[int], seq_lens: list[int], *, copies_bytes: int = 0, **changes: Any
) -> Workload:
    """Return a batch on shuffled blocks, with as many caches as `copies_bytes` asks for."""
    spec = make_spec(**changes)
    num_tokens, num_seqs = sum(query_lens), len(query_lens)
    limits = BatchLimits(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_tokens,
        max_model_len=max(seq_lens),
    )
    backend = TritonAttention(spec, limits, {})
    counts = [-(-n // spec.block_size) for n in seq_lens]
    order = (torch.randperm(sum(counts)) + 1).int()
    table = torch.zeros(num_seqs, max(counts), dtype=torch.int32)
    for row, (part, count) in enumerate(zip(order.split(counts), counts, strict=True)):
        table[row, :count] = part
    dtype = getattr(torch, spec.dtype)
    shape = (1 + sum(counts), *backend.kv_layout(spec).block_shape)
    first = torch.randn(shape, device="cuda", dtype=dtype)
    copies = max(1, -(-copies_bytes // first.nbytes))
    starts = torch.tensor([0, *query_lens]).cumsum(0)

    def ints(values: Any) -> Tensor:
        return torch.as_tensor(values).to("cuda", torch.int32)

    batch = Batch(
        token_ids=ints([0] * num_tokens),
        positions=ints([0] * num_tokens),
        cu_seqlens_q=ints(starts),
        seq_lens=ints(seq_lens),
        logit_rows=ints([]),
        rows=ints(range(num_seqs)),
        groups=(GroupBatch(block_table=table.cuda(), slot_mapping=ints([0] * num_tokens)),),
        query_lens=query_lens,
        seq_lens_bound=seq_lens,
        num_single_token_seqs=query_lens.count(1),
        padded_to=num_seqs,
    )
    q = torch.randn(num_tokens, spec.num_heads, spec.head_dim, device="cuda", dtype=dtype)
    caches = [first, *(first.clone() for _ in range(copies - 1))]
    return Workload(backend, batch, q, caches, torch.empty_like(q))


def milliseconds(launch: Callable[[int], None], *, launches: int = 0, replays: int = 12) -> float:
    """Return the median time of one launch among those of a CUDA graph."""
    launch(0)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    launch(1)
    torch.cuda.synchronize()
    once = time.perf_counter() - begin
    launches = launches or max(4, min(40, int(0.01 / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(launches):
            launch(turn)
    times = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / launches)
    return statistics.median(times[2:])


def exact(work: Workload) -> Tensor:
    """Return the attention of the first cache, in float64."""
    spec, batch, found = work.backend.spec, work.batch, []
    group = spec.num_heads // spec.num_kv_heads
    tables, first = batch.groups[0].block_table.long(), 0
    for row, (query_len, seq_len) in enumerate(
        zip(batch.query_lens, batch.seq_lens_bound, strict=True)
    ):
        blocks = tables[row, : -(-seq_len // spec.block_size)]
        tokens = work.caches[0][blocks].transpose(1, 2).flatten(0, 1)[:seq_len].double()
        k, v = (x.repeat_interleave(group, 1) for x in tokens.split(spec.head_dim, -1))
        q = work.q[first : first + query_len].double()
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.logit_softcap is not None:
            scores = spec.logit_softcap * torch.tanh(scores / spec.logit_softcap)
        positions = torch.arange(seq_len - query_len, seq_len, device="cuda")[:, None]
        keys = torch.arange(seq_len, device="cuda")
        hidden = keys > positions
        if spec.sliding_window is not None:
            hidden |= keys <= positions - spec.sliding_window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, v))
        first += query_len
    return torch.cat(found)


def check_outputs() -> bool:
    """Print the errors against float64 in units of the dtype's rounding; False if one is large."""
    cases: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
        "decode": ([1] * 5, [1, 17, 1000, 4096, 777], {}),
        "one long": ([1], [20000], {}),
        "chunks": ([1, 1, 5, 100, 300], [50, 900, 1000, 100, 1500], {}),
        "window": ([1, 3, 200], [900, 700, 600], {"sliding_window": 128}),
        "soft cap": ([1, 3, 200], [900, 700, 600], {"logit_softcap": 30.0}),
        "dim 256": ([1, 200], [900, 600], {"head_dim": 256, "value_head_dim": 256}),
        "dim 96, 7/1": (
            [1, 40],
            [300, 200],
            {"head_dim": 96, "value_head_dim": 96, "num_heads": 7, "num_kv_heads": 1},
        ),
        "float32": ([1, 200], [900, 600], {"dtype": "float32", "kv_dtype": "float32"}),
        "float16": ([1, 200], [900, 600], {"dtype": "float16", "kv_dtype": "float16"}),
        "block 1": ([1, 200], [900, 600], {"block_size": 1}),
        "block 128": ([1, 200], [900, 600], {"block_size": 128}),
    }
    print("correctness: largest error, in rounding units of the largest output")
    good = True
    for name, (query_lens, seq_lens, changes) in cases.items():
        try:
            work = make_workload(query_lens, seq_lens, **changes)
            work.out.fill_(float("nan"))
            plan = work.backend.plan(work.batch, 0)
            work.backend.prepare(plan)
            work.attend(plan, 0)
            want = exact(work)
            unit = torch.finfo(work.out.dtype).eps * want.abs().max()
            error = ((work.out.double() - want).abs().max() / unit).item()
        except Exception as failure:  # noqa: BLE001 - whatever it is, the next one runs
            print(f"  {name:14} {type(failure).__name__}: {str(failure)[:300]}")
            good = False
            continue
        is_good = error < (40 if work.out.dtype is torch.float32 else 2)
        good &= is_good
        print(f"  {name:14} {error:8.2f}{'' if is_good else '   <- TOO LARGE'}")
    return good


def print_limits() -> None:
    """Print what the card copies and multiplies, measured here."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copied = milliseconds(lambda turn: void(y.copy_(x)), launches=4)
    read = x.view(torch.float32)
    summed = milliseconds(lambda turn: void(read.sum()), launches=4)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    c = torch.empty_like(a)
    multiplied = milliseconds(lambda turn: void(torch.mm(a, a, out=c)), launches=4)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy {2 * x.nbytes / copied / 1e9:.2f} TB/s, sum (reads only) "
          f"{x.nbytes / summed / 1e9:.2f} TB/s, "
          f"matmul 8192 bf16 {2 * 8192**3 / multiplied / 1e9:.0f} TFLOP/s")  # fmt: skip


def void(_: object) -> None:
    """Drop a result."""


def single_tunings() -> Iterator[tuple[str, Tuning]]:
    for (block_n, num_warps, num_stages), (few, few_chunk, most, chunk) in SINGLE:
        tile = Tile(block_m=16, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
        limits = {"few_per_sm": few, "few_chunk": few_chunk, "most_per_sm": most, "chunk": chunk}
        name = f"n{block_n} w{num_warps} s{num_stages}, {few}/SM of {few_chunk}, {most} of {chunk}"
        yield name, evolve(DEFAULT, single=tile, crowd=tile, **limits)


def many_tunings() -> Iterator[tuple[str, Tuning]]:
    for block_m, block_n, num_warps, num_stages in MANY:
        tile = Tile(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
        yield f"m{block_m} n{block_n} w{num_warps} s{num_stages}", evolve(DEFAULT, many=tile)


def sweep(
    title: str,
    work: Workload,
    tunings: Iterator[tuple[str, Tuning]],
    rate_of: Callable[[float], str],
    deadline: float,
) -> None:
    """Time a workload with each tuning; print time and rate, the best at the end."""
    print(title)
    times: dict[str, float] = {}
    for name, tuning in tunings:
        chosen = "*" if tuning in (DEFAULT, evolve(DEFAULT, crowd=DEFAULT.single)) else " "
        if time.perf_counter() > deadline:
            print(f"  {name:34} not run: out of time")
            continue
        try:
            work.backend.set_tuning(tuning)
            plan = work.backend.plan(work.batch, 0)
            work.backend.prepare(plan)
            times[name] = milliseconds(lambda turn, plan=plan: work.attend(plan, turn))
        except Exception as failure:  # noqa: BLE001 - whatever it is, the next one runs
            print(f" {chosen}{name:34} {type(failure).__name__}: {str(failure)[:200]}")
            continue
        print(f" {chosen}{name:34} {1e3 * times[name]:9.1f} us {rate_of(times[name])}", flush=True)
    if times:
        best = min(times, key=times.__getitem__)
        print(f"  best: {best}: {1e3 * times[best]:.1f} us {rate_of(times[best])}")


def time_decodes(deadline: float) -> None:
    cases = {f"{count} x {length}": [length] * count for count, length in DECODES}
    for count in RAGGED:
        lengths = torch.randint(100, 2001, (count,)).tolist()
        cases[f"{count} of 100 to 2000"] = lengths
    for name, seq_lens in cases.items():
        num_bytes = sum(seq_lens) * KV_HEADS * 2 * DIM * 2
        work = make_workload([1] * len(seq_lens), seq_lens, copies_bytes=ROTATED_BYTES)
        sweep(
            f"decode {name}: attend and merge",
            work,
            single_tunings(),
            lambda ms, num_bytes=num_bytes: f"{num_bytes / ms / 1e9:6.2f} TB/s",
            deadline,
        )
        plan = work.backend.plan(work.batch, 0)
        prepared = milliseconds(lambda turn, b=work.backend, p=plan: b.prepare(p), launches=20)
        print(f"  split plan, once a step: {1e3 * prepared:.1f} us")


def time_prompts(deadline: float) -> None:
    for length in PROMPTS:
        # Half of the products are seen: 2 products, 2 operations each.
        num_operations = 2 * 2 * HEADS * DIM * length * (length + 1) / 2
        work = make_workload([length], [length], copies_bytes=ROTATED_BYTES)
        sweep(
            f"prefill {length} causal",
            work,
            many_tunings(),
            lambda ms, n=num_operations: f"{n / ms / 1e9:6.0f} TFLOP/s",
            deadline,
        )
    long = make_workload([512], [32768], copies_bytes=ROTATED_BYTES)
    num_operations = 2 * 2 * HEADS * DIM * 512 * (32768 - 256)
    sweep(
        "chunk of 512 at 32768",
        long,
        many_tunings(),
        lambda ms: f"{num_operations / ms / 1e9:6.0f} TFLOP/s",
        deadline,
    )


def time_writes() -> None:
    """Time the fused norm, rotation and write."""
    print("norm, rotate and write (heads 32/8 of 128)")
    for num_tokens in (1, 64, 256, 2048, 8192):
        blocks = -(-num_tokens // BLOCK) + 1
        caches = [
            torch.empty(blocks, KV_HEADS, BLOCK, 2 * DIM, device="cuda", dtype=torch.bfloat16)
            for _ in range(4)
        ]
        width = (HEADS + 2 * KV_HEADS) * DIM
        qkv = torch.randn(4, num_tokens, width, device="cuda", dtype=torch.bfloat16)
        ids = torch.arange(num_tokens, device="cuda", dtype=torch.int32)
        angles = torch.randn(num_tokens, DIM // 2, device="cuda")
        weight = torch.randn(DIM, device="cuda", dtype=torch.bfloat16)
        rotary, norm = (angles.cos(), angles.sin()), (weight, weight, 1e-6)

        def launch(turn: int, caches: list[Tensor] = caches, ids: Tensor = ids) -> None:
            tokens = caches[turn % 4].transpose(1, 2)
            views = tokens[..., :DIM], tokens[..., DIM:]
            ops.rotate_and_write(qkv[turn % 4], ids, ids, *views, rotary=rotary, norm=norm)  # noqa: B023

        taken = milliseconds(launch)
        rate = 2 * num_tokens * width * 2 / taken / 1e9
        print(f"  {num_tokens:6} tokens {1e3 * taken:9.1f} us {rate:6.2f} TB/s", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("decode", "prefill", "write"))
    parser.add_argument("--seconds", type=float, default=110, help="stop sweeping after so long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; run this on a machine that has one.")
    deadline = time.perf_counter() + arguments.seconds
    torch.manual_seed(0)
    print_limits()
    good = check_outputs()
    if arguments.only in (None, "write"):
        time_writes()
    if arguments.only in (None, "prefill"):
        time_prompts(deadline)
    if arguments.only in (None, "decode"):
        time_decodes(deadline)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
