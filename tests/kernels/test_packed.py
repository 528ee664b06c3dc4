"""Products with tiles of 4-bit codes: the layout, Triton's kernels, and CUDA's on a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, check, draw, poison
from torch import Tensor

from quire.errors import BuildError
from quire_kernels import costs, ops
from quire_kernels.packed import calls, layout, library, product
from quire_kernels.packed.layout import TiledWeight, from_tiles, to_tiles, widened

HAS_COMPILER = library.native.CUDA.why_missing() is None
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Triton's interpreter cuts numbers off where a GPU rounds them to bfloat16; `rounded` mends that.
DTYPES = st.sampled_from([torch.float16, torch.bfloat16])
SHAPES = st.sampled_from([(32, 64, 32), (64, 128, 128), (96, 192, 64), (32, 192, 192)])


def make_weight(
    outputs: int, inputs: int, group_size: int, seed: int = 0, *, is_short: bool = False
) -> TiledWeight:
    """Return a weight of random codes, scales and zero points."""
    generator = torch.Generator().manual_seed(seed)

    def some_bytes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    groups = inputs // group_size
    scales = torch.rand(groups, outputs, generator=generator) * inputs**-0.5
    if is_short:
        scales = scales.bfloat16()
    return TiledWeight(
        tiles=to_tiles(some_bytes(outputs, inputs // 2)).to(DEVICE),
        scales=scales.half().to(DEVICE),
        zeros=some_bytes(groups, outputs // 2).to(DEVICE),
        group_size=group_size,
        has_short_scales=is_short,
    )


def exact_product(x: Tensor, weight: TiledWeight, bias: Tensor | None) -> Tensor:
    exact = x.double() @ widened(weight).double().T
    return exact if bias is None else exact + bias.double()


def plain_product(x: Tensor, weight: TiledWeight, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, widened(weight).to(x.dtype), bias)


def test_codes_lie_where_the_drawing_says() -> None:
    codes = torch.randint(0, 16, (32, 128), dtype=torch.uint8)
    tile = to_tiles(codes[:, ::2] | codes[:, 1::2] << 4)[1, 1]
    place = {0: (0, 0), 1: (8, 0), 2: (0, 8), 3: (8, 8)}

    for lane in range(32):
        g, c = lane // 4, lane % 4
        for word in range(4):
            bits = int(tile[lane, word]) & 0xFFFFFFFF
            for code in range(8):
                further, (down, along) = code // 4, place[code % 4]
                row, column = 16 + g + down, 64 + 16 * word + 2 * c + along + further
                assert bits >> 4 * code & 15 == codes[row, column]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_tiles_give_back_the_codes(tall: int, wide: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (16 * tall, 64 * wide)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)
    values = codes[:, ::2] | codes[:, 1::2] << 4

    assert torch.equal(from_tiles(to_tiles(values)), codes)


def test_repacking_in_slices_is_repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(0, 256, (80, 32), dtype=torch.uint8)
    monkeypatch.setattr(layout, "_SLICE_BYTES", 1024)

    assert torch.equal(layout.tiles_of(values), to_tiles(values))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((48, 64, 64), "48 outputs of 64 inputs make no whole tiles"),
        ((32, 96, 96), "make no whole tiles"),
        ((32, 64, 16), "groups of 16 are neither all inputs nor a power of two from 32 on"),
        ((32, 192, 96), "groups of 96"),
    ],
)
def test_weight_that_makes_no_tiles_is_told_why(shape: tuple[int, int, int], words: str) -> None:
    assert words in (layout.why_not(*shape) or "")
    assert layout.why_not(32, 192, 192) is None


@given(SHAPES, st.integers(1, 4), DTYPES, st.booleans())
@settings(max_examples=12, deadline=None)
def test_triton_product_of_few_rows_is_within_the_bound(
    shape: tuple[int, int, int], rows: int, dtype: torch.dtype, has_bias: bool
) -> None:
    kernels = pytest.importorskip("quire_kernels.packed.triton_kernels")
    weight = make_weight(*shape)
    x = draw(rows, 2 * shape[1], dtype=dtype)[:, shape[1] :]
    bias = draw(shape[0], dtype=dtype, seed=2) if has_bias else None
    out = torch.full((rows, shape[0]), float("nan"), dtype=dtype, device=DEVICE)

    kernels.multiply_few_rows(x, weight, bias, out)

    check(out, exact_product(x, weight, bias), plain_product(x, weight, bias))


@given(SHAPES, DTYPES)
@settings(max_examples=8, deadline=None)
def test_triton_makes_the_weight_wide(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    kernels = pytest.importorskip("quire_kernels.packed.triton_kernels")
    weight = make_weight(*shape)
    poison(shape[0], shape[1], dtype=dtype)

    assert torch.equal(kernels.widen(weight, dtype), widened(weight).to(dtype))


def test_outputs_of_a_weight_are_rows_of_it() -> None:
    weight = make_weight(96, 128, 32, is_short=True)

    part = weight.outputs(32, 96)

    assert (part.out_features, part.in_features) == (64, 128)
    assert part.has_short_scales
    assert torch.equal(widened(part), widened(weight)[32:96])


@pytest.mark.parametrize(("scale", "is_short"), [(1 + 2**-7, True), (1 + 2**-8, False)])
def test_scales_of_eight_bits_are_short(scale: float, is_short: bool) -> None:
    scales = torch.tensor([[0.5, 2.0**-24, 0.0], [1.0, scale, 3.0]], dtype=torch.float16)

    assert layout.are_short(scales) == is_short
    assert layout.are_short(scales[:, ::2])


def test_product_on_a_cpu_is_the_plain_one() -> None:
    weight = make_weight(64, 128, 64)
    x, bias = draw(3, 128), draw(64, seed=1)

    out = product.linear(x, weight, bias)

    assert (out.double() - exact_product(x, weight, bias)).abs().max() <= 1e-5 * out.abs().max()


@given(st.integers(1, 9000), st.integers(1, 2000), st.integers(1, 500), st.sampled_from([78, 132]))
def test_plan_has_a_unit_for_each_block_and_sharers_together_on_the_gpu(
    rows: int, tall: int, wide: int, num_sms: int
) -> None:
    tile_rows, blocks = calls.plan(rows, 32 * tall, 64 * wide, num_sms)

    assert tile_rows in library.TILE_ROWS
    tiles = -(-rows // tile_rows) * -(-32 * tall // 128)
    assert 1 <= blocks <= tiles * -(-wide // 2)
    # Those who share a tile wait for one another, and there is a counter for each.
    assert blocks == tiles or blocks <= num_sms


def test_struct_of_python_is_the_struct_of_the_kernels() -> None:
    text = (library.FOLDER / "arguments.h").read_text()
    body = re.search(r"struct PackedArguments \{(.*?)\n\};", text, re.DOTALL).group(1)  # type: ignore[union-attr]
    found = re.findall(r"^    (?:const )?(\S+) (\w+);$", body, re.MULTILINE)
    kinds = {"int64_t": "c_long", "int32_t": "c_int", "float": "c_float"}

    declared = [(name, kind.__name__) for name, kind in library.Arguments._fields_]

    wanted = [(name, "c_void_p" if "*" in kind else kinds[kind]) for kind, name in found]
    assert declared == wanted


def test_machine_without_a_gpu_has_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "capability_here", lambda: None)

    assert library.is_built()
    with pytest.raises(BuildError, match="no NVIDIA GPU here"):
        library.build(lambda line: None)


def test_only_hopper_gets_the_kernels_of_many_rows() -> None:
    names = {
        capability: {source.path.name for source in library.library_for(capability).sources}
        for capability in [(8, 0), (9, 0), (12, 0)]
    }

    assert names[8, 0] == names[12, 0]
    assert {name for name in names[9, 0] if "many" in name} == names[9, 0] - names[8, 0] != set()
    assert all((library.FOLDER / name).exists() for name in names[9, 0])


# Between them they include every header, and the kernels with the most registers.
COMPILED = {"sm_90a": ("many_rows_256.cu", "many_rows_64.cu"), "sm_80": ("few_rows.cu",)}


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no nvcc here")
@pytest.mark.parametrize("architecture", ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_sources_compile_without_spilling_registers(architecture: str, tmp_path: Path) -> None:
    base = library.library_for((9, 0) if architecture == "sm_90a" else (8, 0))
    assert base.architecture == architecture
    for name in COMPILED[architecture]:
        output = library.native.compilers.run_compiler(
            (
                *library.native.CUDA.require(),
                *base.flags,
                *("-Xptxas", "-v", "-c", str(library.FOLDER / name), "-o", str(tmp_path / "o")),
            )
        )

        assert not re.search(r"[1-9]\d* bytes spill|C75\d\d|serializ", output), output


@pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None,
    reason="this Triton has no compiler for NVIDIA GPUs",
)
def test_triton_kernels_compile_for_an_h100() -> None:
    """The interpreter lets more through."""
    script = Path(__file__).parents[1] / "benchmarks/compile_packed.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bytes of shared memory") == 4


def test_launch_is_told_to_those_who_listen_alone() -> None:
    knobs = pytest.importorskip("triton").knobs
    heard = []

    costs.tell(lambda: pytest.fail("nobody listens"))
    knobs.runtime.launch_enter_hook.add(heard.append)
    costs.tell(lambda: {"name": "mine", "bytes": 3, "flops": 4})
    knobs.runtime.launch_enter_hook.remove(heard.append)

    assert [launch.get()["name"] for launch in heard] == ["mine"]


def built_kernels() -> calls.Kernels:
    """Return the compiled kernels, built first."""
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    library.library_for(capability).build(print)
    kernels = calls.kernels(device)
    assert kernels is not None
    return kernels


GPU_SHAPES = [(64, 128, 128), (96, 192, 64), (32, 256, 32), (160, 192, 192), (512, 4096, 128)]
GPU_ROWS = [1, 3, 8, 16, 17, 64, 65, 150, 256, 300]


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", GPU_ROWS)
@pytest.mark.parametrize("is_short", [False, True])
def test_cuda_products_are_within_the_bound(
    shape: tuple[int, int, int], dtype: torch.dtype, rows: int, is_short: bool
) -> None:
    kernels, weight = built_kernels(), make_weight(*shape, is_short=is_short)
    bias = draw(shape[0], dtype=dtype, seed=2)
    x = draw(rows, 2 * shape[1], dtype=dtype)[:, shape[1] :]
    exact, plain = exact_product(x, weight, bias), plain_product(x, weight, bias)
    entries: list[Callable[..., object]] = [kernels.few_rows] if rows <= 8 else []
    entries += [kernels.many_rows] if kernels.has_many_rows else []

    for entry in entries:
        # Cut from wider rows.
        out = torch.full((rows, shape[0] + 64), float("nan"), dtype=dtype, device=DEVICE)
        entry(x, weight, bias, out[:, 32:-32])

        check(out[:, 32:-32], exact, plain)
        assert bool(out[:, :32].isnan().all())
        assert bool(out[:, -32:].isnan().all())


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_makes_the_weight_wide(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight = make_weight(*shape)
    poison(shape[0], shape[1], dtype=dtype)

    wide = built_kernels().widen(weight, dtype)

    # Half a unit is what rounding once may lose; bfloat16 scales are kept as two numbers.
    exact = widened(weight).double()
    smallest = torch.finfo(dtype).smallest_normal
    assert bool(
        (
            (wide.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + smallest
        ).all()
    )


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 7, 16, 31, 78])
@pytest.mark.parametrize("rows", [16, 64, 150, 300])
def test_products_with_shared_tiles_have_the_same_bits_each_time(
    blocks: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, weight = built_kernels(), make_weight(352, 2048, 128)
    x = draw(rows, 2048, dtype=torch.bfloat16)
    tile_rows = calls.plan(rows, 352, 2048, 132)[0]
    monkeypatch.setattr(calls, "plan", lambda *sizes: (tile_rows, blocks))
    outs = [torch.empty(rows, 352, dtype=x.dtype, device=DEVICE) for _ in range(20)]
    if not kernels.has_many_rows:
        pytest.skip("only Hopper has the kernels of many rows")

    for out in outs:
        kernels.many_rows(x, weight, None, out)

    check(outs[0], exact_product(x, weight, None), plain_product(x, weight, None))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_norm_product_and_silu_in_one_pass_are_the_steps(rows: int, gated: bool) -> None:
    built_kernels()
    weight, dtype = make_weight(512, 1024, 128), torch.bfloat16
    x, residual = draw(rows, 1024, dtype=dtype), draw(rows, 1024, dtype=dtype, seed=3)
    norm = draw(1024, dtype=dtype, seed=4)
    kept = x.clone(), residual.clone()
    assert product.fuses_norm(x, weight, gated=gated)

    out, total = product.add_rms_norm_linear((x, residual), (norm, 1e-5), weight, None, gated=gated)

    assert torch.equal(total, x + residual)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])
    normed = ops.rms_norm(total, norm, 1e-5)
    exact, plain = exact_product(normed, weight, None), plain_product(normed, weight, None)
    if gated:
        (gate, up), plain = exact.chunk(2, 1), ops.silu_mul(plain)
        exact = gate * gate.sigmoid() * up
    check(out, exact, plain)


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("outputs", [96, 512, 8192])
@pytest.mark.parametrize("rows", [9, 64, 100, 256, 300])
def test_silu_behind_a_product_of_many_rows_is_the_steps(rows: int, outputs: int) -> None:
    kernels = built_kernels()
    if not kernels.has_many_rows:
        pytest.skip("only Hopper has the kernels of many rows")
    weight, x = make_weight(outputs, 1024, 128), draw(rows, 1024, dtype=torch.bfloat16)
    assert product.fuses_silu_mul(x, weight)
    poison(rows, outputs // 2, dtype=x.dtype)

    out = product.linear_silu_mul(x, weight)

    gate, up = exact_product(x, weight, None).chunk(2, 1)
    check(out, gate * gate.sigmoid() * up, ops.silu_mul(plain_product(x, weight, None)))


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("rows", [1, 8, 40, 1500, 2500])
def test_product_can_be_captured(rows: int) -> None:
    built_kernels()
    weight, x = make_weight(512, 1024, 128), draw(rows, 1024, dtype=torch.bfloat16)
    expected = product.linear(x, weight, None)
    graph = torch.cuda.CUDAGraph()

    with torch.cuda.graph(graph):
        out = product.linear(x, weight, None)
    out.fill_(float("nan"))
    graph.replay()

    assert torch.equal(out, expected)
