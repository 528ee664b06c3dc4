"""Check the kernels for e4m3 against float64 on a GPU, and time them beside others.

    python tests/benchmarks/gpu_fp8.py [--only rounding|products|layers]

Times are of calls within a replayed CUDA graph; weights are rotated, so that together they exceed
the L2. `layers` runs the products of a chain of Llama-3.1-8B's layers with all that is rounded
between them, in e4m3 and in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as functional
from attrs import evolve
from gpu_kernels import DTYPE, bound, draw, guarded, seconds
from torch import Tensor

from quire_kernels import fp8, ops
from quire_kernels.fp8 import Matrix, Scaling

EPS = 1e-5
HIDDEN, INNER = 4096, 14336
SHAPES = {
    "qkv": (6144, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192)
BLOCK = (128, 128)
ROTATED_BYTES = 200 << 20
NUM_LAYERS = 8


def main() -> None:
    """Print the tables that were asked for."""
    parts = {"rounding": rounding_rows, "products": product_rows, "layers": layer_rows}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=parts, help="one part")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for part in [parts[arguments.only]] if arguments.only else parts.values():
        for row in part():
            guarded(row)


def rounding_rows() -> Iterator[Callable[[], None]]:
    """Yield what rows cost that are rounded with what makes them, and what makes them alone."""
    for num_rows in (1, 256, 8192):
        yield lambda num_rows=num_rows: round_rows(num_rows)


def round_rows(num_rows: int) -> None:
    """Time the three sources of rows."""
    x, residual, weight = draw(num_rows, HIDDEN), draw(num_rows, HIDDEN), draw(HIDDEN)
    gate_up, scaling = draw(num_rows, 2 * INNER), Scaling()
    times = {
        "alone": seconds(lambda i: fp8.quantize(x, scaling)),
        "norm": seconds(lambda i: ops.add_rms_norm(x, residual, weight, EPS)),
        "norm, rounded": seconds(
            lambda i: fp8.add_rms_norm_quantize(x, residual, weight, EPS, scaling)
        ),
        "SiLU": seconds(lambda i: ops.silu_mul(gate_up)),
        "SiLU, rounded": seconds(lambda i: fp8.silu_mul_quantize(gate_up, scaling)),
    }
    words = ", ".join(f"{name} {time * 1e6:.1f}" for name, time in times.items())
    print(f"{num_rows} rows, us: {words}", flush=True)


def make(num_out: int, size: int, *, block: tuple[int, int] | None = None) -> Matrix:
    """Draw a weight."""
    values, scales = fp8.quantize(draw(num_out, size, scale=size**-0.5), Scaling())
    if block is not None:
        scales = torch.rand(num_out // block[0], size // block[1], device="cuda") * 1e-3
    return Matrix(values=values, scales=scales, sizes=(num_out,), block=block)


def wide(weight: Matrix) -> Tensor:
    """Return a weight in float32."""
    scales = weight.scales
    if weight.block is not None:
        scales = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return weight.values.float() * scales


def scaled_mm(x: Tensor, scales: Tensor, weight: Matrix) -> Tensor:
    """Multiply by PyTorch."""
    out: Tensor = torch._scaled_mm(
        x, weight.values.t(), scales, weight.scales.t(), out_dtype=DTYPE, use_fast_accum=True
    )
    return out


def product_rows() -> Iterator[Callable[[], None]]:
    """Yield each shape with each number of rows."""
    print(f"{'':22} {'us':>9} {'_scaled_mm':>10} {'bfloat16':>9} {'blocks':>9}  TB/s TFLOP/s right")
    for num_rows in ROWS:
        for name in SHAPES:
            yield lambda name=name, num_rows=num_rows: time_product(name, num_rows)


def time_product(name: str, num_rows: int) -> None:
    """Time one product by what serves it, by PyTorch, in bfloat16, and with blocks."""
    num_out, size = SHAPES[name]
    weights = [make(num_out, size) for _ in range(ROTATED_BYTES // (num_out * size) + 1)]
    blocks = [
        evolve(w, scales=make(num_out, size, block=BLOCK).scales, block=BLOCK) for w in weights
    ]
    x = draw(num_rows, size)
    values, scales = fp8.quantize(x, Scaling())
    grouped = fp8.quantize(x, Scaling(group=BLOCK[1]))
    copies = len(weights)

    def ours(i: int) -> Tensor:
        out = fp8.product(values, scales, weights[i], None, DTYPE)
        return scaled_mm(values, scales, weights[i]) if out is None else out

    def with_blocks(i: int) -> Tensor:
        out = fp8.product(*grouped, blocks[i], None, DTYPE)
        assert out is not None
        return out

    times = [seconds(ours, copies)]
    times.append(seconds(lambda i: scaled_mm(values, scales, weights[i]), copies))
    plain = [wide(weight).to(DTYPE) for weight in weights]
    times.append(seconds(lambda i: functional.linear(x, plain[i]), copies))
    times.append(seconds(with_blocks, copies))
    seen = values.double() * scales
    right = bound(ours(0), seen @ wide(weights[0]).double().T, seen.to(DTYPE) @ plain[0].T)
    seen = grouped[0].double() * grouped[1].repeat_interleave(BLOCK[1], 1)
    exact = seen @ wide(blocks[0]).double().T
    right += ", " + bound(with_blocks(0), exact, seen.to(DTYPE) @ wide(blocks[0]).to(DTYPE).T)
    amount = num_out * size / times[0] / 1e12
    columns = " ".join(f"{time * 1e6:>9.1f}" for time in times)
    rates = f"{amount:5.2f} {2 * num_rows * amount:6.0f}"
    print(f"{num_rows:>5} rows, {name:8} {columns} {rates} {right}", flush=True)


def layer_rows() -> Iterator[Callable[[], None]]:
    """Yield the chain with several numbers of rows."""
    layers = [[make(*shape) for shape in SHAPES.values()] for _ in range(NUM_LAYERS)]
    plain = [[wide(weight).to(DTYPE) for weight in layer] for layer in layers]
    for num_rows in ROWS[:8]:
        yield lambda num_rows=num_rows: time_layers(num_rows, layers, plain)


def time_layers(num_rows: int, layers: list[list[Matrix]], plain: list[list[Tensor]]) -> None:
    """Time both chains."""
    norm, scaling = draw(HIDDEN), Scaling()
    start = draw(num_rows, HIDDEN), draw(num_rows, HIDDEN)

    def multiply(rounded: fp8.Rounded, weight: Matrix) -> Tensor:
        out = fp8.product(*rounded, weight, None, DTYPE)
        return scaled_mm(*rounded, weight) if out is None else out

    def in_e4m3(i: int) -> None:
        x, residual = start[0].clone(), start[1]
        for qkv, o, gate_up, down in layers:
            rounded, residual = fp8.add_rms_norm_quantize(x, residual, norm, EPS, scaling)
            attended = multiply(rounded, qkv)[:, :HIDDEN]
            x = multiply(fp8.quantize(attended, scaling), o)
            rounded, residual = fp8.add_rms_norm_quantize(x, residual, norm, EPS, scaling)
            x = multiply(fp8.silu_mul_quantize(multiply(rounded, gate_up), scaling), down)

    def in_bfloat16(i: int) -> None:
        x, residual = start[0].clone(), start[1]
        for qkv, o, gate_up, down in plain:
            attended, residual = ops.add_rms_norm_linear(x, residual, norm, EPS, qkv)
            x = ops.linear(attended[:, :HIDDEN], o)
            gated, residual = ops.add_rms_norm_linear_silu_mul(x, residual, norm, EPS, gate_up)
            x = ops.linear(gated, down)

    times = [seconds(chain, repeats=3) / NUM_LAYERS * 1e6 for chain in (in_e4m3, in_bfloat16)]
    print(f"{num_rows:>5} rows, us a layer: {times[0]:.1f}, bfloat16 {times[1]:.1f}", flush=True)


if __name__ == "__main__":
    main()
