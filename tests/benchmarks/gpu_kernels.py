"""Check the Triton kernels against float64 on a GPU, and time them beside PyTorch.

    python tests/benchmarks/gpu_kernels.py [--sweep] [--only norms|products|fused|sampling|host]

Times are of calls within a replayed CUDA graph, each call with inputs of its own: matrices are
rotated so that together they exceed the L2, activations are few and stay in it, as in a model.
`--sweep` tries launch shapes of the one-row product instead, for `quire_kernels.gemv.plan`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from quire.interfaces.sampling import SamplingBatch
from quire_kernels import activation, gemv, norms, sampling
from quire_sampling.reference.sampler import ReferenceSampler

Call = Callable[[int], Any]

EPS = 1e-6
DTYPE = torch.bfloat16
DEVICE = "cuda"
ROTATED_BYTES = 256 << 20
NORM_SHAPES = [(1, 1024), (1, 4096), (256, 1024), (256, 4096), (8192, 4096)]
SILU_SHAPES = [(1, 3072), (1, 14336), (256, 14336)]
# Name, outputs, inputs.
PRODUCTS = [
    ("0.6B qkv", 4096, 1024),
    ("0.6B o", 1024, 2048),
    ("0.6B gate_up", 6144, 1024),
    ("0.6B down", 1024, 3072),
    ("0.6B head", 151936, 1024),
    ("8B qkv", 6144, 4096),
    ("8B o", 4096, 4096),
    ("8B gate_up", 28672, 4096),
    ("8B down", 4096, 14336),
    ("8B head", 128256, 4096),
]
FUSED = [("0.6B", 1024, 4096, 3072), ("8B", 4096, 6144, 14336)]
VOCAB = 151936


def main() -> None:
    """Print the tables that were asked for."""
    parts = {
        "norms": norm_rows,
        "products": product_rows,
        "fused": fused_rows,
        "sampling": sampling_rows,
        "host": host_rows,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="try launch shapes of products")
    parser.add_argument("--only", choices=parts, help="one part")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}")
    print(f"{'':34} {'Quire us':>9} {'PyTorch us':>10} {'ratio':>6} {'TB/s':>6}  correct")
    chosen = [sweep_rows] if arguments.sweep else list(parts.values())
    for part in [parts[arguments.only]] if arguments.only else chosen:
        for row in part():
            guarded(row)


def guarded(row: Callable[[], None]) -> None:
    """Print a row; one that fails says why and lets the others follow."""
    try:
        row()
    except Exception:  # noqa: BLE001
        print("FAILED:", " | ".join(traceback.format_exc().strip().splitlines()[-3:]), flush=True)
    torch.cuda.empty_cache()


def seconds(call: Call, copies: int = 1, *, repeats: int = 7) -> float:
    """Return the median time of a call in a replayed graph that makes many, by copy in turn."""
    num_calls = max(copies, 20)
    torch.cuda.synchronize()  # what is drawn on another stream is there
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(min(copies, 3)):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            call(i % copies)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats + 2):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / num_calls)
    return statistics.median(times[2:])


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    """Return normal random numbers."""
    return (torch.randn(*shape, device=DEVICE) * scale).to(DTYPE)


def bound(out: Tensor, exact: Tensor, plain: Tensor) -> str:
    """Return yes, or by how much the bound of Numerics is exceeded."""
    unit = torch.finfo(out.dtype).eps * exact.abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + unit
    error = (out.double() - exact).abs().max()
    return "yes" if bool(error <= allowed) else f"NO: {(error / allowed).item():.2f} x the bound"


def show(name: str, ours: float, theirs: float, num_bytes: float, correct: str) -> None:
    """Print one row."""
    speed = num_bytes / ours / 1e12
    line = f"{name:34} {ours * 1e6:>9.2f} {theirs * 1e6:>10.2f} {theirs / ours:>6.2f} {speed:>6.2f}"
    print(f"{line}  {correct}", flush=True)


def norm_exactly(x: Tensor, weight: Tensor) -> Tensor:
    """Return RMSNorm in float64."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def silu_mul_exactly(gate_up: Tensor) -> Tensor:
    """Return SiLU of the gate times up in float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Return RMSNorm by PyTorch."""
    return functional.rms_norm(x, weight.shape, weight, EPS)


def plain_silu_mul(gate_up: Tensor) -> Tensor:
    """Return SiLU of the gate times up by PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def norm_rows() -> Iterator[Callable[[], None]]:
    """Yield the rows of norms and activations."""
    for shape in NORM_SHAPES:
        yield functools.partial(norm_row, *shape)
        yield functools.partial(add_norm_row, *shape)
    for shape in SILU_SHAPES:
        yield functools.partial(silu_row, *shape)


def norm_row(num_rows: int, size: int) -> None:
    """Time RMSNorm."""
    xs, weight = [draw(num_rows, size) for _ in range(4)], draw(size)
    out = norms.rms_norm(xs[0], weight, EPS)
    correct = bound(out, norm_exactly(xs[0], weight), plain_norm(xs[0], weight))
    ours = seconds(lambda i: norms.rms_norm(xs[i], weight, EPS), 4)
    theirs = seconds(lambda i: plain_norm(xs[i], weight), 4)
    show(f"rms_norm [{num_rows}, {size}]", ours, theirs, 4 * num_rows * size, correct)


def add_norm_row(num_rows: int, size: int) -> None:
    """Time RMSNorm of a sum."""
    # Small enough not to overflow: the sum goes back into x every time.
    xs, weight = [draw(num_rows, size) for _ in range(4)], draw(size)
    residual = draw(num_rows, size, scale=1e-3)
    total = xs[0] + residual
    out, found = norms.add_rms_norm(xs[0].clone(), residual, weight, EPS)
    correct = bound(out, norm_exactly(total, weight), plain_norm(total, weight))
    correct = correct if torch.equal(found, total) else "NO: the sum"
    ours = seconds(lambda i: norms.add_rms_norm(xs[i], residual, weight, EPS), 4)
    theirs = seconds(lambda i: plain_norm(xs[i].add_(residual), weight), 4)
    show(f"add_rms_norm [{num_rows}, {size}]", ours, theirs, 8 * num_rows * size, correct)


def silu_row(num_rows: int, size: int) -> None:
    """Time SiLU of the gate times up."""
    xs = [draw(num_rows, 2 * size) for _ in range(4)]
    correct = bound(activation.silu_mul(xs[0]), silu_mul_exactly(xs[0]), plain_silu_mul(xs[0]))
    ours = seconds(lambda i: activation.silu_mul(xs[i]), 4)
    theirs = seconds(lambda i: plain_silu_mul(xs[i]), 4)
    show(f"silu_mul [{num_rows}, {size} * 2]", ours, theirs, 6 * num_rows * size, correct)


def matrices(num_out: int, size: int) -> list[Tensor]:
    """Return copies of a matrix that together exceed the L2."""
    copies = max(2, -(-ROTATED_BYTES // (2 * num_out * size)))
    return [draw(num_out, size, scale=size**-0.5) for _ in range(min(copies, 64))]


def always_planned(num_out: int, size: int, *, gated: bool = False) -> tuple[int, int, int]:
    """Return a launch shape also where cuBLAS would be taken."""
    return PLAN(min(num_out, 16384), min(size, 16384), gated=gated) or (2, 1024, 4)


PLAN = gemv.plan


def product_rows() -> Iterator[Callable[[], None]]:
    """Yield the rows of one-row products."""
    for name, num_out, size in PRODUCTS:
        yield functools.partial(product_row, name, num_out, size)


def product_row(name: str, num_out: int, size: int) -> None:
    """Time the one-row product beside cuBLAS, whichever of them is planned."""
    x, weights = draw(1, size), matrices(num_out, size)
    planned = "GEMV" if PLAN(num_out, size) else "cuBLAS"
    plain = functional.linear(x, weights[0])
    gemv.plan = always_planned  # type: ignore[assignment]
    try:
        out = gemv.linear(x, weights[0], None)
        correct = bound(out, exact_product(x, weights[0]), plain)
        ours = seconds(lambda i: gemv.linear(x, weights[i], None), len(weights))
    finally:
        gemv.plan = PLAN
    theirs = seconds(lambda i: functional.linear(x, weights[i]), len(weights))
    show(f"{name} {num_out} x {size}", ours, theirs, 2 * num_out * size, f"{correct}; {planned}")


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return the product in float64, some rows of the weight at a time."""
    return torch.cat([functional.linear(x.double(), w.double()) for w in weight.split(8192)], -1)


def fused_rows() -> Iterator[Callable[[], None]]:
    """Yield the rows of products with a norm before or SiLU after, by model."""
    for name, hidden, num_qkv, intermediate in FUSED:
        for row in (norm_linear_row, linear_silu_row, norm_linear_silu_row):
            yield functools.partial(row, name, hidden, num_qkv, intermediate)


def inputs_of_a_norm(hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a row, a residual and the weight of a norm."""
    return draw(1, hidden), draw(1, hidden, scale=1e-3), draw(hidden)


def norm_linear_row(name: str, hidden: int, num_qkv: int, intermediate: int) -> None:
    """Time norm and product fused, and one after the other."""
    x, residual, norm_weight = inputs_of_a_norm(hidden)
    weights = matrices(num_qkv, hidden)

    def separate(i: int) -> Tensor:
        normed, _ = norms.add_rms_norm(x, residual, norm_weight, EPS)
        return linear_as_planned(normed, weights[i])

    def fused(i: int) -> Tensor:
        return gemv.add_rms_norm_linear(x, residual, norm_weight, EPS, weights[i], None)[0]

    exact = exact_product(norm_exactly(x + residual, norm_weight), weights[0])
    plain = functional.linear(plain_norm(x + residual, norm_weight), weights[0])
    correct = bound(fused(0), exact, plain)
    theirs, ours = seconds(separate, len(weights)), seconds(fused, len(weights))
    show(f"{name} norm + qkv (beside: two)", ours, theirs, 2 * num_qkv * hidden, correct)


def linear_silu_row(name: str, hidden: int, num_qkv: int, intermediate: int) -> None:
    """Time product and SiLU fused, and one after the other."""
    x, weights = draw(1, hidden), matrices(2 * intermediate, hidden)

    def separate(i: int) -> Tensor:
        return activation.silu_mul(linear_as_planned(x, weights[i]))

    def fused(i: int) -> Tensor:
        return gemv.linear_silu_mul(x, weights[i])

    exact = silu_mul_exactly(exact_product(x, weights[0]))
    correct = bound(fused(0), exact, plain_silu_mul(functional.linear(x, weights[0])))
    theirs, ours = seconds(separate, len(weights)), seconds(fused, len(weights))
    show(f"{name} gate_up + SiLU (beside: two)", ours, theirs, 4 * intermediate * hidden, correct)


def norm_linear_silu_row(name: str, hidden: int, num_qkv: int, intermediate: int) -> None:
    """Time norm, product and SiLU fused, and one after the other."""
    x, residual, norm_weight = inputs_of_a_norm(hidden)
    weights = matrices(2 * intermediate, hidden)

    def separate(i: int) -> Tensor:
        normed, _ = norms.add_rms_norm(x, residual, norm_weight, EPS)
        return activation.silu_mul(linear_as_planned(normed, weights[i]))

    def fused(i: int) -> Tensor:
        weight = weights[i]
        return gemv.add_rms_norm_linear_silu_mul(x, residual, norm_weight, EPS, weight)[0]

    exact = silu_mul_exactly(exact_product(norm_exactly(x + residual, norm_weight), weights[0]))
    plain = functional.linear(plain_norm(x + residual, norm_weight), weights[0])
    correct = bound(fused(0), exact, plain_silu_mul(plain))
    theirs, ours = seconds(separate, len(weights)), seconds(fused, len(weights))
    show(f"{name} norm + gate_up + SiLU (three)", ours, theirs, 4 * intermediate * hidden, correct)


def linear_as_planned(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `ops.linear` returns."""
    served = gemv.serves(x, weight)
    return gemv.linear(x, weight, None) if served else functional.linear(x, weight)


def sampling_rows() -> Iterator[Callable[[], None]]:
    """Yield the rows of the sampler: batches, greedy, temperature, filters."""
    kinds: dict[str, dict[str, float]] = {
        "greedy": {"temperature": 0.0},
        "temperature 0.6": {"temperature": 0.6},
        "top_k 50, top_p 0.9": {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
        "top_p 0.95": {"temperature": 1.0, "top_p": 0.95},
        "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
        "unfiltered, filters launched": {"temperature": 0.6, "any": 1},
    }
    for num_rows, peak in itertools.product((1, 256), (True, False)):
        for name, values in kinds.items():
            yield functools.partial(sampling_row, name, values, num_rows, peak)


def sampling_row(name: str, values: dict[str, float], num_rows: int, peak: bool) -> None:
    """Time a sampler's step beside the reference sampler's.

    Peaked logits have a few likely tokens, as a trained model's; flat ones are normal.
    """
    logits = [torch.randn(num_rows, VOCAB, device=DEVICE) for _ in range(2)]
    logits = [(3 * x + x.abs().pow(2.5) * (x > 2.5) if peak else x).to(DTYPE) for x in logits]
    batch = batch_of(values, num_rows)
    filters = (batch.top_k, batch.top_p, batch.min_p)
    is_filtered = batch.any_top_k or batch.any_top_p or batch.any_min_p or "any" in values

    def ours(i: int) -> tuple[Tensor, Tensor]:
        draw_of = (batch.temperature, batch.seed, batch.child_index, batch.position)
        return sampling.sample(logits[i], *draw_of, filters if is_filtered else None)

    reference = ReferenceSampler()
    want = reference.sample(logits[0].clone(), batch)
    token_ids, status = ours(0)
    same = int((token_ids == want.token_ids[:, 0]).sum())
    correct = f"{same}/{num_rows} tokens equal" + (", STATUS" if int(status.sum()) else "")
    taken = seconds(ours, 2)
    theirs = seconds(lambda i: reference.sample(logits[i], batch), 2, repeats=3)
    shape = f"{'peaked' if peak else 'flat'} {num_rows}"
    show(f"{shape} {name}"[:34], taken, theirs, 2 * num_rows * VOCAB, correct)


def batch_of(values: dict[str, float], num_rows: int) -> SamplingBatch:
    """Return a batch whose rows differ by their seeds."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.full((num_rows,), values.get(name, default), dtype=dtype, device=DEVICE)

    rows = torch.arange(num_rows, device=DEVICE)
    return SamplingBatch(
        temperature=column("temperature", 1.0, torch.float32),
        top_k=column("top_k", VOCAB, torch.int64),
        top_p=column("top_p", 1.0, torch.float32),
        min_p=column("min_p", 0.0, torch.float32),
        seed=rows * 7919 + 1,
        child_index=rows * 0,
        position=rows * 0 + 100,
        rows=rows.int(),
        all_greedy=values.get("temperature") == 0,
        any_greedy=values.get("temperature") == 0,
        any_top_k="top_k" in values,
        any_top_p="top_p" in values,
        any_min_p="min_p" in values,
    )


def host_rows() -> Iterator[Callable[[], None]]:
    """Yield rows of what a call costs the host when nothing is captured."""
    from quire_kernels import ops

    x, residual, weight = draw(1, 1024), draw(1, 1024, scale=1e-3), draw(1024)
    gate_up, matrix = draw(1, 6144), draw(1024, 1024)
    two = draw(2, 1024)
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "rms_norm": (
            lambda: ops.rms_norm(x, weight, EPS),
            lambda: plain_norm(x, weight),
        ),
        "add_rms_norm": (
            lambda: ops.add_rms_norm(x, residual, weight, EPS),
            lambda: plain_norm(x.add_(residual), weight),
        ),
        "silu_mul": (lambda: ops.silu_mul(gate_up), lambda: plain_silu_mul(gate_up)),
        "linear, one row": (
            lambda: ops.linear(x, matrix),
            lambda: functional.linear(x, matrix),
        ),
        "linear, two rows": (
            lambda: ops.linear(two, matrix),
            lambda: functional.linear(two, matrix),
        ),
    }
    for name, (ours, theirs) in calls.items():
        yield functools.partial(host_row, name, ours, theirs)


def host_row(name: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """Time calls on the host, without waiting for the GPU."""
    show(f"host: {name}", host_seconds(ours), host_seconds(theirs), 0, "")


def host_seconds(call: Callable[[], Any]) -> float:
    """Return the median time that a call takes before it returns."""
    rounds = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            call()
        rounds.append((time.perf_counter() - start) / 200)
    return statistics.median(rounds[2:])


def sweep_rows() -> Iterator[Callable[[], None]]:
    """Yield a row a product: the best launch shapes."""
    for name, num_out, size in PRODUCTS:
        yield functools.partial(sweep_row, name, num_out, size, False)
    for name, hidden, _, intermediate in FUSED:
        yield functools.partial(sweep_row, f"{name} gated", 2 * intermediate, hidden, True)


def sweep_row(name: str, num_out: int, size: int, gated: bool) -> None:
    """Print the three best launch shapes of a product, and cuBLAS."""
    x, weights = draw(1, size), matrices(num_out, size)
    theirs = seconds(lambda i: functional.linear(x, weights[i]), len(weights))
    found = []
    for outputs, block, warps in itertools.product((1, 2, 4, 8), (1024, 2048), (4, 8)):
        if outputs * block < 1024 * warps // 4 or (block > 1024 and size % block):
            continue
        gemv.plan = lambda *_, shape=(outputs, block, warps), **__: shape  # type: ignore[misc]
        try:
            call = gemv.linear_silu_mul if gated else functools.partial(gemv.linear, bias=None)
            taken = seconds(lambda i, call=call: call(x, weights[i]), len(weights), repeats=5)  # type: ignore[misc]
            found.append((taken, (outputs, block, warps)))
        finally:
            gemv.plan = PLAN
    found.sort()
    for taken, shape in found[:3]:
        show(f"{name} {shape}", taken, theirs, 2 * num_out * size, "")


if __name__ == "__main__":
    main()
