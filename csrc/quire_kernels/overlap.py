"""Let a kernel begin while the one before it ends: programmatic dependent launch.

A kernel launched with `options()` may start as soon as every program of the kernel before has
called `let_next_begin`. What that kernel or an earlier one wrote may be read, and anything may be
written, only after `wait_for_previous`; before it a kernel may read weights. Every kernel that is
launched so has to wait, or those behind it would not wait for those before it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_begin(OVERLAPS: tl.constexpr):
    """Allow the next kernel to start, once all programs came here or ended."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAPS: tl.constexpr):
    """Wait until the kernel before has ended and what it wrote can be seen."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def prefetch(pointers, NUM_BYTES: tl.constexpr):
    """Ask for NUM_BYTES, a multiple of 16, from each pointer on to be brought to the L2 cache.

    For kernels that overlap: their GPUs have the instruction.
    """
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [pointers.to(tl.int64, bitcast=True), tl.full(pointers.shape, NUM_BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@functools.cache
def options() -> dict[str, Any]:
    """Return the launch options of a kernel that calls both; plain ones on older GPUs."""
    if knobs.runtime.interpret or not torch.cuda.is_available():
        return {"OVERLAPS": False}
    major, _ = torch.cuda.get_device_capability()
    return {"OVERLAPS": True, "launch_pdl": True} if major >= 9 else {"OVERLAPS": False}
