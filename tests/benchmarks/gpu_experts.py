"""Time products with experts on a GPU, and choose how they are cut.

    python tests/benchmarks/gpu_experts.py [--models NAME ...] [--write csrc/quire_kernels]

Without `--write` it prints what a layer's experts take: tokens, microseconds, the bandwidth of the
weights that are read, and arithmetic. With it every cut is tried for every number of pairs, and the
best ones are put into the folder's table, for this card.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_kernels import draw, seconds
from torch import Tensor

from quire_kernels import experts, mixtures, ops, routing
from quire_kernels import experts_plans as plans
from quire_kernels.experts_plans import Cut

# Experts, experts a token, hidden size, an expert's size.
MODELS = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "gpt-oss-20b": (32, 4, 2880, 2880),
}
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384)
Shape = tuple[int, int, int, int]


def candidates(rows: int, *, gated: bool) -> list[Cut]:
    """Return cuts that may be the best of so many rows."""
    if rows >= 64:
        sizes = [(64, 64), (128, 64)] if gated else [(64, 64), (128, 64), (256, 64)]
        found = [
            Cut(rows, *size, warps, stages)
            for size in sizes
            for warps in (4, 8)
            for stages in (3, 4)
        ]
        return [cut for cut in found if cut.outputs < 256 or cut.warps == 8]
    sizes = (
        [(32, 128), (64, 64), (64, 128), (32, 256)] if gated else [(32, 256), (64, 128), (128, 64)]
    )
    return [Cut(rows, *size, 4, stages) for size in sizes for stages in (3, 5)]


def weights_of(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return gate_up and down of a layer, random."""
    num_experts, _, hidden, size = shape
    gate_up = torch.randn(num_experts, 2 * size, hidden, dtype=torch.bfloat16, device="cuda")
    down = torch.randn(num_experts, hidden, size, dtype=torch.bfloat16, device="cuda")
    return gate_up * hidden**-0.5, down * size**-0.5


def one_product(
    shape: Shape,
    num_tokens: int,
    weights: tuple[Tensor, Tensor],
    cut: Cut,
    *,
    gated: bool,
) -> float:
    """Return the seconds of one product of tokens that choose at random."""
    num_experts, top_k, hidden, size = shape
    ids = torch.rand(num_tokens, num_experts, device="cuda").topk(top_k).indices.flatten()
    tiles = routing.plan(ids, num_experts, cut.rows)
    x = draw(num_tokens, hidden) if gated else draw(len(ids), size)
    out = torch.empty(len(ids), size if gated else hidden, dtype=x.dtype, device="cuda")
    weight, k = (weights[0], top_k) if gated else (weights[1], 1)
    return seconds(
        lambda i: experts.product(x, weight, out, tiles, top_k=k, gated=gated, cut=cut),
        repeats=3,
    )


def compile_some(shapes: list[Shape], part: int, parts: int) -> None:
    """Compile a part of all cuts, so that Triton's cache has them."""
    every = [
        (shape, rows, gated, cut)
        for shape in shapes
        for rows in (16, 32, 64, 128)
        for gated in (True, False)
        for cut in candidates(rows, gated=gated)
    ]
    for shape, rows, gated, cut in every[part::parts]:
        one = (1, 1, *shape[2:])
        try:
            weights = tuple(
                torch.zeros(1, n, k, dtype=torch.bfloat16, device="cuda")
                for n, k in ((2 * shape[3], shape[2]), (shape[2], shape[3]))
            )
            ids = torch.zeros(1, dtype=torch.int64, device="cuda")
            x = draw(1, shape[2] if gated else shape[3])
            out = torch.empty(1, shape[3] if gated else shape[2], dtype=x.dtype, device="cuda")
            # The number of experts is no part of the kernel, that of experts a token is.
            experts.product(
                x,
                weights[not gated],
                out,
                routing.plan(ids, 1, rows),
                top_k=shape[1] if gated else 1,
                gated=gated,
                cut=cut,
            )
        except Exception as error:  # noqa: BLE001
            print(f"{one} {rows} {cut}: {type(error).__name__}", flush=True)


def tuned(shape: Shape) -> dict[str, list[object]]:
    """Return the best cuts of each bucket."""
    num_experts, top_k, _, _ = shape
    weights, found = weights_of(shape), {}
    for bucket in plans.BUCKETS:
        num_tokens = bucket * num_experts // top_k
        if not 4 < num_tokens <= 16384 + 1:
            continue
        best: dict[int, tuple[float, Cut, Cut]] = {}
        for rows in (16, 32, 64, 128):
            if rows > max(16, 4 * bucket) or rows * 8 < bucket:
                continue
            chosen = []
            for gated in (True, False):
                times = {}
                for cut in candidates(rows, gated=gated):
                    try:
                        times[cut] = one_product(shape, num_tokens, weights, cut, gated=gated)
                    except Exception as error:  # noqa: BLE001
                        print(f"{shape} {bucket} {rows} {cut}: {type(error).__name__}", flush=True)
                cut = min(times, key=lambda c: times[c])
                chosen.append((times[cut], cut))
            best[rows] = (chosen[0][0] + chosen[1][0], chosen[0][1], chosen[1][1])
        rows = min(best, key=lambda r: best[r][0])
        told = {r: round(t * 1e6, 1) for r, (t, _, _) in best.items()}
        print(plans.name_of(shape), bucket, num_tokens, told, best[rows][1:], flush=True)
        as_list = [[c.outputs, c.columns, c.warps, c.stages] for c in best[rows][1:]]
        found[str(bucket)] = [rows, *as_list]
    return found


def measure(name: str) -> None:
    """Print what a layer takes."""
    shape = MODELS[name]
    num_experts, top_k, hidden, size = shape
    gate_up, down = weights_of(shape)
    gate = draw(num_experts, hidden, scale=hidden**-0.5)
    for num_tokens in TOKENS:
        x = [draw(num_tokens, hidden) for _ in range(4)]
        routed = [mixtures.route(own @ gate.T, top_k, normalise=True) for own in x]
        calls: dict[str, Callable[[int], object]] = {
            "all": lambda i, x=x, routed=routed: ops.experts(x[i], gate_up, down, *routed[i]),
            "gate": lambda i, x=x: ops.linear(x[i], gate),
            "choice": lambda i, x=x: mixtures.route(x[i] @ gate.T, top_k, normalise=True),
            "plan": lambda i, routed=routed: routing.plan(routed[i][1].flatten(), num_experts, 16),
        }
        times = {key: seconds(call, 4) for key, call in calls.items()}
        all_of_it = times.pop("all")
        used = len(routed[0][1].unique())
        num_bytes, flops = used * 6 * hidden * size, 6 * num_tokens * top_k * hidden * size
        print(
            f"{name} {num_tokens:6} tokens: {all_of_it * 1e6:8.1f} us, {used} experts, "
            f"{num_bytes / all_of_it / 1e12:.2f} TB/s, {flops / all_of_it / 1e12:.0f} TFLOP/s; "
            + ", ".join(f"{key} {own * 1e6:.1f}" for key, own in times.items()),
            flush=True,
        )


def main() -> None:
    """Measure, or choose and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["qwen3-30b-a3b"], choices=MODELS)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    if given.write is None:
        for name in given.models:
            measure(name)
        return
    shapes = [MODELS[name] for name in given.models]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_some, args=(shapes, i, 12)) for i in range(12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    path = given.write / plans.TABLE
    table = json.loads(path.read_text())
    own = table.setdefault(torch.cuda.get_device_name(), {})
    own.update({plans.name_of(shape): tuned(shape) for shape in shapes})
    path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
