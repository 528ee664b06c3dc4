"""Compile the Triton kernels of packed weights for an H100 or H200 without one.

    python tests/benchmarks/compile_packed.py

Prints the shared memory of each, and fails where one does not compile.
"""

from __future__ import annotations

import os
from typing import Any

# The interpreter replaces the compiler when a kernel is defined.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire_kernels.packed import triton_kernels

TARGET = GPUTarget("cuda", 90, 32)
CODES = {"tiles_ptr": "*i32", "scales_ptr": "*fp16", "zeros_ptr": "*u8"}
STRIDES = dict.fromkeys(("scale_stride", "zero_stride", "group_size", "num_chunks"), "i32")
FEW_ROWS = {"x_stride": "i32", "out_stride": "i32"}


def compile_one(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> None:
    """Compile a kernel and say what it takes."""
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={})
    compiled = triton.compile(source, target=TARGET, options={"num_warps": 4})
    print(f"{kernel.__name__} {compiled.metadata.shared} bytes of shared memory")


def main() -> None:
    """Compile each kernel for each type."""
    for dtype in ("*bf16", "*fp16"):
        rows = {"x_ptr": dtype, **CODES, "bias_ptr": dtype, "out_ptr": dtype, **FEW_ROWS, **STRIDES}
        few_rows = triton_kernels._few_rows_kernel
        compile_one(few_rows, rows, {"CHUNKS": triton_kernels.CHUNKS, "BIASED": True})
        wide = {**CODES, "out_ptr": dtype, **STRIDES}
        compile_one(triton_kernels._widen_kernel, wide, {"CHUNKS": triton_kernels.CHUNKS})


if __name__ == "__main__":
    main()
