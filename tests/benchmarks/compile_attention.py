"""Compile the attention kernels for an H100 or H200 without one: registers, spills, shared memory.

    python tests/benchmarks/compile_attention.py [--hot] [--only deepseek-v2-lite,deepseek-v3]

Each variant is compiled with the arguments that the backend launches it with, on memory of the
CPU. Fails where a kernel spills registers or wants more shared memory than there is.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The interpreter replaces the compiler when a kernel is defined.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from attrs import define, frozen
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import quire_kernels.rotary
from quire.interfaces.attention import AttentionSpec, BatchLimits, LatentSpec
from quire.interfaces.batch import Batch, GroupBatch
from quire_attention.triton import kernels, latent
from quire_attention.triton.backend import TritonAttention

TARGET = GPUTarget("cuda", 90, 32)
MAX_SHARED_BYTES = 232448
LIMITS = BatchLimits(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=8192)
LLAMA: dict[str, Any] = {
    **{"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "value_head_dim": 128},
    **{"scale": 128**-0.5, "dtype": "bfloat16", "block_size": 16, "device": "cpu"},
}
DEEPSEEK: dict[str, Any] = {
    **{"num_heads": 16, "num_kv_heads": 1, "head_dim": 576, "value_head_dim": 512},
    "latent": LatentSpec(kv_lora_rank=512, rope_head_dim=64, nope_head_dim=128, v_head_dim=128),
    "block_size": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3-0.6b": {"num_heads": 16},
    "qwen2-7b": {"num_heads": 28, "num_kv_heads": 4},
    "no-groups": {"num_heads": 8},
    "group-32": {"num_kv_heads": 1},
    "block-128": {"block_size": 128},
    "block-1": {"block_size": 1},
    "dim-64": {"head_dim": 64, "value_head_dim": 64},
    "dim-64-sinks": {"head_dim": 64, "value_head_dim": 64, "sinks": True, "sliding_window": 128},
    "dim-80": {"head_dim": 80, "value_head_dim": 80},
    "dim-96": {"head_dim": 96, "value_head_dim": 96},
    "dim-256": {"head_dim": 256, "value_head_dim": 256},
    "gemma": {
        **{"head_dim": 256, "value_head_dim": 256, "num_heads": 16},
        **{"sliding_window": 4096, "logit_softcap": 50.0},
    },
    "window": {"sliding_window": 4096},
    "bloom": {"num_heads": 112, "num_kv_heads": 112, "alibi": True},
    "falcon": {"num_kv_heads": 1, "head_dim": 64, "value_head_dim": 64, "alibi": True},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "fp8": {"kv_dtype": "float8_e4m3fn"},
    "fp8-e5m2": {"kv_dtype": "float8_e5m2", "block_size": 128},
    "fp8-256": {"kv_dtype": "float8_e4m3fn", "head_dim": 256, "value_head_dim": 256},
    "float32-256": {"dtype": "float32", "head_dim": 256, "value_head_dim": 256},
    "deepseek-v2-lite": DEEPSEEK,
    "deepseek-v3": {**DEEPSEEK, "num_heads": 128},
    "latent-32": {**DEEPSEEK, "num_heads": 32, "block_size": 16},
    "latent-float32": {**DEEPSEEK, "dtype": "float32"},
}
HOT = ("llama", "block-128")


@define
class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    kernel: Any
    launches: list[tuple[Any, dict[str, Any]]]

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            names = dict(zip(self.kernel.arg_names, arguments, strict=False))
            left = {p.name: p.default for p in self.kernel.params if p.has_default}
            self.launches.append((self.kernel, {**left, **names, **named}))

        return launch


@frozen
class Usage:
    """What a compiled kernel takes of an SM."""

    registers: int
    stack_bytes: int
    shared_bytes: int

    @property
    def is_good(self) -> bool:
        return self.stack_bytes == 0 and self.shared_bytes <= MAX_SHARED_BYTES


class Layer:
    """A layer, with sinks and slopes where the model has them, and scales of a quantized cache."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.sinks = torch.zeros(spec.num_heads) if spec.sinks else None
        self.k_scale = torch.ones(spec.num_kv_heads) if spec.has_quantized_kv else None
        self.v_scale = self.k_scale
        self.alibi_slopes = torch.ones(spec.num_heads) if spec.alibi else None


def make_spec(changes: dict[str, Any]) -> AttentionSpec:
    values = {**LLAMA, **changes}
    return AttentionSpec(**{"kv_dtype": values["dtype"], **values})


def make_batch(query_lens: list[int]) -> Batch:
    num_seqs, num_tokens = len(query_lens), sum(query_lens)

    def ints(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.int32)

    return Batch(
        token_ids=ints(num_tokens),
        positions=ints(num_tokens),
        cu_seqlens_q=ints(num_seqs + 1),
        seq_lens=ints(num_seqs),
        logit_rows=ints(num_seqs),
        rows=ints(num_seqs),
        groups=(GroupBatch(block_table=ints(num_seqs, 9), slot_mapping=ints(num_tokens)),),
        query_lens=query_lens,
        seq_lens_bound=[9 * 16] * num_seqs,
        num_single_token_seqs=query_lens.count(1),
        padded_to=num_seqs,
    )


def launches_of(spec: AttentionSpec) -> list[tuple[Any, dict[str, Any]]]:
    """Return the kernels that a decode, a few tokens and a prompt launch, and their arguments."""
    found: list[tuple[Any, dict[str, Any]]] = []
    places = [(kernels, "attend"), (kernels, "merge"), (kernels, "plan_splits")]
    own = [(module, name, getattr(module, name)) for module, name in (*places, (latent, "attend"))]
    for module, name, kernel in own:
        setattr(module, name, Recorder(kernel, found))
    try:
        backend = TritonAttention(spec, LIMITS, {})
        dtype = getattr(torch, spec.dtype)
        layout, layer = backend.kv_layout(spec), Layer(spec)
        cache = torch.empty(12, *layout.block_shape, dtype=getattr(torch, layout.dtype))
        for query_lens in ([1] * 9, [4], [100]):
            batch = make_batch(query_lens)
            plan = backend.plan(batch, 0)
            backend.prepare(plan)
            q = torch.empty(sum(query_lens), spec.num_heads, spec.head_dim, dtype=dtype)
            out = torch.empty(len(q), spec.num_heads, spec.value_head_dim, dtype=dtype)
            backend.attend(layer, q, q, q, cache, plan, out)
    finally:
        for module, name, kernel in own:
            setattr(module, name, kernel)
    return found


def fused_write_of(spec: AttentionSpec) -> list[tuple[Any, dict[str, Any]]]:
    """Return the launch of the fused write, with a norm."""
    found: list[tuple[Any, dict[str, Any]]] = []
    kernel = quire_kernels.rotary._rotate_and_write_kernel
    quire_kernels.rotary._rotate_and_write_kernel = Recorder(kernel, found)
    try:
        dtype, dim = getattr(torch, spec.dtype), spec.head_dim
        shape = (12, spec.block_size, spec.num_kv_heads, dim)
        cache = torch.empty(shape, dtype=getattr(torch, spec.kv_dtype))
        scale = Layer(spec).k_scale
        weight, table = torch.empty(dim, dtype=dtype), torch.empty(9, dim // 2)
        qkv = torch.empty(4, (spec.num_heads + 2 * spec.num_kv_heads) * dim, dtype=dtype)
        ids = torch.ones(4, dtype=torch.int32)
        quire_kernels.rotary.rotate_and_write(
            qkv,
            ids,
            ids,
            cache,
            cache,
            rotary=(table, table),
            norm=(weight, weight, 1e-6),
            scales=None if scale is None else (scale, scale),
        )
    finally:
        quire_kernels.rotary._rotate_and_write_kernel = kernel
    return found


TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}


def compiled(kernel: Any, arguments: dict[str, Any]) -> Any:
    """Compile a launch as Triton would at its first call on the GPU."""
    options = {
        key: arguments[key] for key in ("num_warps", "num_stages", "maxnreg") if key in arguments
    }
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        is_one = value == 1 if isinstance(value, int) else False
        if parameter.is_constexpr or value is None or (is_one and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGET, options=options)


def usage_of(binary: Any) -> Usage:
    """Return what cuobjdump says of a compiled kernel; spilled registers lie on the stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", printed)[0]
    return Usage(int(registers), int(stack), binary.metadata.shared)


def rows(names: list[str]) -> Iterator[tuple[str, str, str, Usage]]:
    """Yield (variant, kernel, tile, usage) of each kernel of the named variants."""
    for name in names:
        spec = make_spec(VARIANTS[name])
        fused = [] if spec.latent else fused_write_of(spec)
        for kernel, arguments in (*launches_of(spec), *fused):
            tile = ""
            if "BLOCK_M" in arguments:
                kind = "single" if arguments["SINGLE"] else "several"
                tile = f"{kind} {arguments['BLOCK_M']}x{arguments['BLOCK_N']}"
                tile += f" w{arguments['num_warps']} s{arguments['num_stages']}"
            yield name, kernel.__name__, tile, usage_of(compiled(kernel, arguments))


def main() -> None:
    """Print a table; exit with 1 where a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hot", action="store_true", help="only the kernels that are tuned")
    parser.add_argument("--only", help="variants, separated by commas")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else list(HOT if given.hot else VARIANTS)
    print(f"triton {triton.__version__}, sm_{TARGET.arch}")
    print(f"{'variant':18}{'kernel':26}{'tile':22}{'registers':>10}{'stack':>7}{'shared':>8}")
    bad = 0
    for name, kernel, tile, usage in rows(names):
        mark = "" if usage.is_good else "  <- spills or does not fit"
        bad += not usage.is_good
        print(
            f"{name:18}{kernel:26}{tile:22}{usage.registers:10}{usage.stack_bytes:7}"
            f"{usage.shared_bytes:8}{mark}",
            flush=True,
        )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
