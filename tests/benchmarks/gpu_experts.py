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

from quire_kernels import biased_experts, experts, mixtures, ops, routing
from quire_kernels import experts_plans as plans
from quire_kernels.experts_plans import Cut

# Experts, experts a token, hidden size, an expert's size.
MODELS = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "gpt-oss-120b": (128, 4, 2880, 2880),
}
# Their experts have biases, and lie as [inputs, outputs].
BIASED = {"gpt-oss-20b", "gpt-oss-120b"}
# A product that takes so many seconds is timed by a few launches, not in a graph.
LONG_S, LONG_CALLS = 4e-4, 4
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384)


class Layer:
    """The experts of a layer, random, and one product of theirs."""

    def __init__(self, model: str, num_experts: int | None = None) -> None:
        given, self.top_k, hidden, size = MODELS[model]
        self.num_experts, self.sizes = num_experts or given, (hidden, size)
        self.biased = model in BIASED
        gate_up, down = (2 * size, hidden), (hidden, size)
        self.weights = self._drawn(*gate_up), self._drawn(*down)
        dtype = torch.bfloat16
        self.biases = [
            torch.randn(self.num_experts, n, dtype=dtype, device="cuda") for n, _ in (gate_up, down)
        ]

    def _drawn(self, outputs: int, inputs: int) -> Tensor:
        shape = (inputs, outputs) if self.biased else (outputs, inputs)
        drawn = torch.randn(self.num_experts, *shape, dtype=torch.bfloat16, device="cuda")
        return drawn.mul_(inputs**-0.5)

    def product(self, ids: Tensor, cut: Cut, *, gated: bool) -> Callable[[int], object]:
        """Return the first or the second product of the experts that tokens chose."""
        num_pairs, (hidden, size) = ids.numel(), self.sizes
        tiles = routing.plan(ids.flatten(), self.num_experts, cut.rows)
        x = draw(len(ids), hidden) if gated else draw(num_pairs, size)
        weight, k = self.weights[not gated], self.top_k if gated else 1
        if self.biased:
            bias, rows = self.biases[not gated], {"top_k": k, "num_pairs": num_pairs}
            return lambda i: biased_experts.product(x, weight, bias, tiles, **rows, cut=cut)
        out = torch.empty(num_pairs, size if gated else hidden, dtype=x.dtype, device="cuda")
        own = {"top_k": k, "gated": gated, "cut": cut}
        return lambda i: experts.product(x, weight, out, tiles, **own)

    def all(self, x: Tensor, routed: tuple[Tensor, Tensor]) -> Tensor:
        """Return the sums."""
        if not self.biased:
            return ops.experts(x, *self.weights, *routed)
        pairs = zip(self.weights, self.biases, strict=True)
        return ops.clamped_experts(x, *pairs, *routed, alpha=1.702, limit=7.0)


def biased_candidates(rows: int) -> list[Cut]:
    """Return cuts of products with biases that may be the best of so many rows."""
    if rows < 64:
        sizes = [(32, 128), (64, 64), (64, 128), (128, 64)]
        return [Cut(rows, *size, 4, stages) for size in sizes for stages in (3, 5)]
    sizes = [(64, 64), (128, 64), (256, 64)]
    found = [Cut(rows, *size, warps, s) for size in sizes for warps in (4, 8) for s in (3, 4)]
    return [cut for cut in found if cut.outputs < 256 or cut.warps == 8]


def candidates(rows: int, *, gated: bool, biased: bool = False) -> list[Cut]:
    """Return cuts that may be the best of so many rows."""
    if biased:
        return biased_candidates(rows)
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


def one_product(layer: Layer, num_tokens: int, cut: Cut, *, gated: bool) -> float:
    """Return the seconds of one product of tokens that choose at random."""
    scores = torch.rand(num_tokens, layer.num_experts, device="cuda")
    call = layer.product(scores.topk(layer.top_k).indices, cut, gated=gated)
    call(0)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(LONG_CALLS):
        call(i)
    end.record()
    end.synchronize()
    took = start.elapsed_time(end) / 1e3 / LONG_CALLS
    # Of short ones that is the time of a launch.
    return took if took > LONG_S else seconds(call, repeats=3)


def compile_some(models: list[str], part: int, parts: int) -> None:
    """Compile a part of all cuts, so that Triton's cache has them."""
    every = [
        (model, gated, cut)
        for model in models
        for rows in (16, 32, 64, 128)
        for gated in (True, False)
        for cut in candidates(rows, gated=gated, biased=model in BIASED)
    ]
    for model, gated, cut in every[part::parts]:
        try:
            # The number of experts is no part of the kernel, that of experts a token is.
            layer = Layer(model, num_experts=MODELS[model][1])
            ids = torch.arange(layer.top_k, device="cuda").unsqueeze(0)
            layer.product(ids, cut, gated=gated)(0)
        except Exception as error:  # noqa: BLE001
            print(f"{model} {cut}: {type(error).__name__}", flush=True)


def tuned(model: str) -> dict[str, list[object]]:
    """Return the best cuts of each bucket."""
    layer, found = Layer(model), {}
    for bucket in plans.BUCKETS:
        num_tokens = bucket * layer.num_experts // layer.top_k
        if not 4 < num_tokens <= 16384 + 1:
            continue
        best: dict[int, tuple[float, Cut, Cut]] = {}
        for rows in (16, 32, 64, 128):
            if rows > max(16, 4 * bucket) or rows * 8 < bucket:
                continue
            chosen = []
            for gated in (True, False):
                times = {}
                for cut in candidates(rows, gated=gated, biased=layer.biased):
                    try:
                        times[cut] = one_product(layer, num_tokens, cut, gated=gated)
                    except Exception as error:  # noqa: BLE001
                        print(f"{model} {bucket} {cut}: {type(error).__name__}", flush=True)
                cut = min(times, key=lambda c: times[c])
                chosen.append((times[cut], cut))
            best[rows] = (chosen[0][0] + chosen[1][0], chosen[0][1], chosen[1][1])
        rows = min(best, key=lambda r: best[r][0])
        told = {r: round(t * 1e6, 1) for r, (t, _, _) in best.items()}
        print(model, bucket, num_tokens, told, flush=True)
        as_list = [[c.outputs, c.columns, c.warps, c.stages] for c in best[rows][1:]]
        found[str(bucket)] = [rows, *as_list]
    return found


def measure(name: str) -> None:
    """Print what a layer takes."""
    num_experts, top_k, hidden, size = MODELS[name]
    layer = Layer(name)
    gate = draw(num_experts, hidden, scale=hidden**-0.5)
    for num_tokens in TOKENS:
        x = [draw(num_tokens, hidden) for _ in range(4)]
        routed = [mixtures.route(own @ gate.T, top_k, normalise=True) for own in x]
        calls: dict[str, Callable[[int], object]] = {
            "all": lambda i, x=x, routed=routed: layer.all(x[i], routed[i]),
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
    context = multiprocessing.get_context("spawn")
    different = list({MODELS[name][1:]: name for name in given.models}.values())
    args = [(different, i, 12) for i in range(12)]
    workers = [context.Process(target=compile_some, args=own) for own in args]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    path = given.write / plans.TABLE
    table = json.loads(path.read_text())
    card = table.setdefault(torch.cuda.get_device_name(), {})
    for model in given.models:
        card[plans.name_of(MODELS[model], biased=model in BIASED)] = tuned(model)
        path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
