"""Time products of a few rows on a GPU beside cuBLAS, alone and as a layer's chain.

    python tests/benchmarks/gpu_few_rows.py [--sweep] [--rows 2,15,64]

bfloat16; each time is the median over replays of a CUDA graph whose launches go round weights that
exceed the L2 cache. `--sweep` first tries many cuts of each product and prints the best ones beside
the planned one, marked `*`; kernels are compiled in all processors at once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator

import gpu_kernels
import torch
import torch.nn.functional as functional
import triton
from attrs import Factory, define, evolve
from gpu_kernels import EPS, bound, draw, exact_product, matrices, seconds, silu_mul_exactly
from torch import Tensor

from quire_kernels import few_rows, ops
from quire_kernels.few_rows import Plan

# Name, outputs, size, and whether SiLU of the first half times the second follows.
SHAPES = (
    ("llama qkv", 6144, 4096, False),
    ("llama o", 4096, 4096, False),
    ("llama gate_up", 28672, 4096, True),
    ("llama down", 4096, 14336, False),
    ("qwen qkv", 4096, 1024, False),
    ("qwen o", 1024, 2048, False),
    ("qwen gate_up", 6144, 1024, True),
    ("qwen down", 1024, 3072, False),
)
# Hidden size, outputs of q and of q, k and v, intermediate size.
LAYERS = (("llama", 4096, 4096, 6144, 14336), ("qwen", 1024, 2048, 4096, 3072))
ROWS = (2, 16, 32, 64, 128)
PLANNED = few_rows.plan


@define
class Product:
    """A product of some rows with one of several weights, which are made by `fill`."""

    name: str
    num_out: int
    size: int
    gated: bool
    num_rows: int
    x: Tensor | None = None
    weights: list[Tensor] = Factory(list)

    def fill(self, weights: list[Tensor]) -> Product:
        """Draw the input and take the weights."""
        self.x, self.weights = draw(self.num_rows, self.size), weights
        return self

    @property
    def planned(self) -> Plan | None:
        """The cut that is used."""
        rows, num_out = few_rows.padded(self.num_rows), self.num_out // (1 + self.gated)
        return PLANNED(rows, num_out, self.size, gated=self.gated)

    def ours(self, i: int) -> Tensor:
        """Multiply with the kernels here, however they are planned."""
        assert self.x is not None
        if self.gated:
            return few_rows.linear_silu_mul(self.x, self.weights[i])
        return few_rows.linear(self.x, self.weights[i], None)

    def theirs(self, i: int) -> Tensor:
        """Multiply with cuBLAS."""
        assert self.x is not None
        out = functional.linear(self.x, self.weights[i])
        return ops.silu_mul(out) if self.gated else out

    def is_right(self) -> str:
        """Return yes, or by how much the bound is exceeded."""
        assert self.x is not None
        exact = exact_product(self.x, self.weights[0])
        return bound(self.ours(0), silu_mul_exactly(exact) if self.gated else exact, self.theirs(0))

    def candidates(self) -> Iterator[Plan]:
        """Yield cuts whose stages fit, of one, two or three programs a multiprocessor."""
        rows, num_out = few_rows.padded(self.num_rows), self.num_out // (1 + self.gated)
        shapes = itertools.product((64, 128), (64, 128, 256), (3, 4, 5, 6), (4, 8))
        for outputs, block, stages, warps in shapes:
            tile = (outputs * (1 + self.gated) + rows) * block * 2
            sums = outputs * rows * (1 + self.gated) // (32 * warps)
            if sums > 160 or (warps == 8) != (outputs == 128) or self.size % block:
                continue
            if not 40 * 1024 <= stages * tile <= 220 * 1024:
                continue
            tiles, most = triton.cdiv(num_out, outputs), self.size // block
            for parts in sorted({min(max(1, n // tiles), most) for n in (1, 132, 264, 396)}):
                yield Plan(rows, outputs, block, parts, stages, warps)


def products(rows: tuple[int, ...]) -> Iterator[Product]:
    """Yield each product with its weights, which the next one gets where they are the same."""
    for name, num_out, size, gated in SHAPES:
        torch.cuda.empty_cache()
        weights = matrices(num_out, size)
        for num_rows in rows:
            yield Product(name, num_out, size, gated, num_rows).fill(weights)


def with_plan(plan: Plan) -> None:
    """Cut every product so."""
    few_rows.plan = lambda *_, **__: plan  # type: ignore[assignment]


def variants(rows: tuple[int, ...]) -> list[tuple[Product, Plan]]:
    """Return one product for each kernel that the sweep compiles."""
    found = {}
    for shape, num_rows in itertools.product(SHAPES, rows):
        product = Product(*shape, num_rows)
        for plan in product.candidates():
            key = (product.gated, evolve(plan, parts=min(plan.parts, 2)))
            found.setdefault(key, (product, plan))
    return list(found.values())


def compile_some(jobs: list[tuple[Product, Plan]]) -> None:
    """Compile kernels into Triton's cache by calling them once."""
    for product, plan in jobs:
        with_plan(plan)
        try:
            product.fill([draw(product.num_out, product.size)]).ours(0)
        except Exception as error:  # noqa: BLE001
            print("FAILED:", product.name, plan, str(error)[:200], flush=True)


def compile_all(rows: tuple[int, ...]) -> None:
    """Compile what the sweep will run, in as many processes as there are processors."""
    jobs, count = variants(rows), os.cpu_count() or 1
    print(f"{len(jobs)} kernels to compile", flush=True)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_some, args=(jobs[i::count],)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def sweep(rows: tuple[int, ...]) -> None:
    """Print the fastest cuts of each product."""
    compile_all(rows)
    for product in products(rows):
        planned, copies = product.planned, len(product.weights)
        times: list[tuple[float, Plan]] = []
        for plan in dict.fromkeys([*([planned] if planned else []), *product.candidates()]):
            with_plan(plan)
            try:
                times.append((seconds(product.ours, copies, repeats=3), plan))
            except Exception as error:  # noqa: BLE001
                print("FAILED:", product.name, plan, str(error)[:120], flush=True)
        theirs = seconds(product.theirs, copies, repeats=3)
        best = sorted(times, key=lambda pair: pair[0])
        shown = [f"{t * 1e6:.2f}{'*' if p == planned else ''} {cut(p)}" for t, p in best[:4]]
        shown += [f"{t * 1e6:.2f}* {cut(p)}" for t, p in best[4:] if p == planned]
        head = f"{product.name:14} {product.num_rows:>4} cuBLAS {theirs * 1e6:.2f} |"
        print(head, " | ".join(shown), flush=True)
    few_rows.plan = PLANNED


def cut(plan: Plan) -> str:
    """Write a plan shortly: rows, outputs and columns, parts, stages, warps."""
    return f"{plan.rows}x{plan.outputs}x{plan.block} p{plan.parts} s{plan.stages} w{plan.warps}"


def alone(rows: tuple[int, ...]) -> None:
    """Print each planned product: its time, cuBLAS's, and whether it is right."""
    for product in products(rows):
        if product.planned is None:
            continue
        copies = len(product.weights)
        ours, theirs = seconds(product.ours, copies), seconds(product.theirs, copies)
        name, num_bytes = f"{product.name} {product.num_rows}", 2 * product.num_out * product.size
        gpu_kernels.show(name, ours, theirs, num_bytes, product.is_right())


def layers(rows: tuple[int, ...]) -> None:
    """Print the time of a layer's products and norms in turn, as planned and with cuBLAS."""
    for (name, hidden, q_size, qkv_size, inner), num_rows in itertools.product(LAYERS, rows):
        shapes = ((qkv_size, hidden), (hidden, q_size), (2 * inner, hidden), (hidden, inner))
        count = 8 if name == "llama" else 28
        weights = [[draw(*shape, scale=shape[1] ** -0.5) for shape in shapes] for _ in range(count)]
        tensors = draw(hidden), draw(num_rows, hidden), torch.zeros_like(draw(num_rows, hidden))
        step = functools.partial(layer, weights, tensors, q_size)
        num_bytes = 2 * sum(a * b for a, b in shapes)
        ours, theirs = (seconds(functools.partial(step, served), count) for served in (True, False))
        gpu_kernels.show(f"{name} layer, {num_rows} rows", ours, theirs, num_bytes, "")
        del weights, step
        torch.cuda.empty_cache()


def layer(
    weights: list[list[Tensor]],
    tensors: tuple[Tensor, Tensor, Tensor],
    q_size: int,
    served: bool,
    i: int,
) -> None:
    """Launch what a layer does but attention."""
    norm, x, zero = tensors
    qkv, o, gate_up, down = weights[i]
    linear = ops.linear if served else functional.linear
    normed, _ = ops.add_rms_norm(x, zero, norm, EPS)
    attended = linear(linear(normed, qkv)[:, :q_size], o)
    normed, _ = ops.add_rms_norm(attended, zero, norm, EPS)
    if served:
        linear(ops.linear_silu_mul(normed, gate_up), down)
    else:
        linear(ops.silu_mul(linear(normed, gate_up)), down)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    arguments = parser.parse_args()
    rows = tuple(int(n) for n in arguments.rows.split(","))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'':34} {'Quire us':>9} {'cuBLAS us':>10} {'ratio':>6} {'TB/s':>6}  correct")
    for part in [alone, layers, *([sweep] if arguments.sweep else [])]:
        try:
            part(rows)
        except Exception:  # noqa: BLE001
            print("FAILED:", traceback.format_exc()[-1500:], flush=True)


if __name__ == "__main__":
    sys.exit(main())
