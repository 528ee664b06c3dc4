"""The products in Triton, for GPUs and machines on which the CUDA C++ is not built.

A few rows are multiplied as they are; for more the weight is made wide, piece by piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels import costs
from quire_kernels.packed.layout import TILE_IN, TILE_OUT, TiledWeight
from quire_kernels.rounding import rounded

MAX_ROWS = 4
# Tiles of inputs that a program has at one time.
CHUNKS = 8


@triton.jit
def _words(tiles_ptr, tile, chunks, num_chunks):
    """Load words [8 g, chunks, 4 words, 4 c] of some tiles of the same 16 outputs."""
    g = tl.arange(0, 8)[:, None, None, None]
    word = tl.arange(0, 4)[None, None, :, None]
    c = tl.arange(0, 4)[None, None, None, :]
    chunk = chunks[None, :, None, None]
    at = ((tile.to(tl.int64) * num_chunks + chunk) * 32 + g * 4 + c) * 4 + word
    return tl.load(tiles_ptr + at, mask=chunk < num_chunks, other=0)


@triton.jit
def _of_groups(scales_ptr, zeros_ptr, rows, groups, scale_stride, zero_stride, are_inside):
    """Load scales and zero points, float32 [8, ...], of outputs and their groups."""
    inside = are_inside & (rows >= 0)
    scale = tl.load(scales_ptr + groups * scale_stride + rows, mask=inside, other=0.0)
    zeros = tl.load(zeros_ptr + groups * zero_stride + rows // 2, mask=inside, other=0)
    zero = (zeros.to(tl.int32) >> rows % 2 * 4) & 15
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit(launch_metadata=costs.of_tiled_product)
def _few_rows_kernel(
    x_ptr,
    tiles_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    out_stride,
    scale_stride,
    zero_stride,
    group_size,
    num_chunks,
    CHUNKS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Make 16 outputs of one row: program (tile, row)."""
    tile, row = tl.program_id(0), tl.program_id(1)
    rows = tile * 16 + tl.arange(0, 8)
    sums_low = tl.zeros((8, CHUNKS, 4), tl.float32)
    sums_high = tl.zeros((8, CHUNKS, 4), tl.float32)
    for start in range(0, num_chunks, CHUNKS):
        chunks = start + tl.arange(0, CHUNKS)
        words = _words(tiles_ptr, tile, chunks, num_chunks)
        inside = (chunks < num_chunks)[None, :, None]
        first = chunks[None, :, None] * 64 + tl.arange(0, 4)[None, None, :] * 16
        low = tl.zeros((8, CHUNKS, 4), tl.float32)
        high = tl.zeros((8, CHUNKS, 4), tl.float32)
        total = tl.zeros((1, CHUNKS, 4), tl.float32)
        for i in tl.static_range(4):
            further = i // 2 + i % 2 * 8  # the neighbour, the half of 16 inputs
            at = first[:, :, :, None] + 2 * tl.arange(0, 4)[None, None, None, :] + further
            x = tl.load(x_ptr + row * x_stride + at, mask=inside[:, :, :, None], other=0.0)
            x = x.to(tl.float32)
            shift = i // 2 * 16 + i % 2 * 8
            low += tl.sum(((words >> shift) & 15).to(tl.float32) * x, axis=3)
            high += tl.sum(((words >> (shift + 4)) & 15).to(tl.float32) * x, axis=3)
            total += tl.sum(x, axis=3)
        groups = first // group_size
        at = rows[:, None, None]
        scale, zero = _of_groups(
            scales_ptr, zeros_ptr, at, groups, scale_stride, zero_stride, inside
        )
        sums_low += scale * (low - zero * total)
        scale, zero = _of_groups(
            scales_ptr, zeros_ptr, at + 8, groups, scale_stride, zero_stride, inside
        )
        sums_high += scale * (high - zero * total)
    out_at = out_ptr + row * out_stride + rows
    low = tl.sum(tl.sum(sums_low, axis=2), axis=1)
    high = tl.sum(tl.sum(sums_high, axis=2), axis=1)
    if BIASED:
        low += tl.load(bias_ptr + rows).to(tl.float32)
        high += tl.load(bias_ptr + rows + 8).to(tl.float32)
    tl.store(out_at, rounded(low, out_ptr.dtype.element_ty))
    tl.store(out_at + 8, rounded(high, out_ptr.dtype.element_ty))


@triton.jit(launch_metadata=costs.of_tensors)
def _widen_kernel(
    tiles_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    scale_stride,
    zero_stride,
    group_size,
    num_chunks,
    CHUNKS: tl.constexpr,
):
    """Make wide 16 outputs of some tiles: program (tile, block of tiles)."""
    tile = tl.program_id(0)
    start = tl.program_id(1) * CHUNKS
    words = _words(tiles_ptr, tile, start + tl.arange(0, CHUNKS), num_chunks)
    inputs = start * 64 + tl.arange(0, CHUNKS * 64)[None, :]
    inside = inputs < num_chunks * 64
    for half in tl.static_range(2):
        near = tl.join((words >> (4 * half)) & 15, (words >> (4 * half + 16)) & 15)
        far = tl.join((words >> (4 * half + 8)) & 15, (words >> (4 * half + 24)) & 15)
        # [g, chunks, words, c, neighbour, half of 16 inputs], in the order of the inputs.
        codes = tl.permute(tl.join(near, far), (0, 1, 2, 5, 3, 4))
        codes = tl.reshape(codes, (8, CHUNKS * 64)).to(tl.float32)
        rows = (tile * 16 + half * 8 + tl.arange(0, 8))[:, None]
        scale, zero = _of_groups(
            scales_ptr, zeros_ptr, rows, inputs // group_size, scale_stride, zero_stride, inside
        )
        wide = rounded((codes - zero) * scale, out_ptr.dtype.element_ty)
        at = out_ptr + rows.to(tl.int64) * num_chunks * 64 + inputs
        tl.store(at, wide, mask=inside & (rows >= 0))


def _strides(weight: TiledWeight) -> dict[str, int]:
    return {
        "scale_stride": weight.scales.stride(0),
        "zero_stride": weight.zeros.stride(0),
        "group_size": weight.group_size,
        "num_chunks": weight.in_features // TILE_IN,
    }


def multiply_few_rows(x: Tensor, weight: TiledWeight, bias: Tensor | None, out: Tensor) -> None:
    """Write x W^T + b into `out` [rows, out_features], which may be strided; up to 4 rows."""
    _few_rows_kernel[(weight.out_features // TILE_OUT, x.shape[0])](
        x,
        weight.tiles,
        weight.scales,
        weight.zeros,
        bias,
        out,
        x.stride(0),
        out.stride(0),
        **_strides(weight),
        CHUNKS=CHUNKS,
        BIASED=bias is not None,
        num_warps=4,
    )


def widen(weight: TiledWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight [out_features, in_features], rounded to a dtype of 16 bits."""
    shape = (weight.out_features, weight.in_features)
    wide = torch.empty(shape, dtype=dtype, device=weight.tiles.device)
    grid = (weight.out_features // TILE_OUT, triton.cdiv(weight.in_features // TILE_IN, CHUNKS))
    _widen_kernel[grid](
        weight.tiles,
        weight.scales,
        weight.zeros,
        wide,
        **_strides(weight),
        CHUNKS=CHUNKS,
        num_warps=4,
    )
    return wide
