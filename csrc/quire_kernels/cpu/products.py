"""Products with weights of 8 and 4 bits on a CPU: integers, and codes in groups."""

from __future__ import annotations

import functools

import torch
from attrs import frozen
from torch import Tensor

from quire_kernels.cpu import ISAS, LIBRARY, calls

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILE_OUT, QUAD = 16, 4
# Bytes that are moved into tiles at one time.
_SLICE_BYTES = 1 << 20


@functools.cache
def is_built() -> bool:
    """Answer whether the library is there; found out once, nobody waits."""
    return LIBRARY.is_built()


@functools.cache
def multiplies_integers_fast() -> bool:
    """Answer whether the library is there and sums four products of integers at once here."""
    return is_built() and ISAS[calls.best_isa()] == "avx512_bf16"


def empty_int8_tiles(outputs: int, inputs: int) -> Tensor:
    """Return tiles of zeros, uint8 [outputs / 16 rounded up, inputs / 4, 16, 4].

    `inputs` is a multiple of 4. Values are kept plus 128.
    """
    shape = (-(-outputs // TILE_OUT), inputs // QUAD, TILE_OUT, QUAD)
    return torch.full(shape, 128, dtype=torch.uint8)


def put_int8(tiles: Tensor, first: int, values: Tensor) -> None:
    """Put int8 `values` [count, inputs] into tiles, from output `first` on, a multiple of 16."""
    assert first % TILE_OUT == 0, f"output {first} begins no tile"
    tile, quads = first // TILE_OUT, tiles.shape[1]
    rows = values.view(torch.uint8) ^ 128
    whole, rest = divmod(rows.shape[0], TILE_OUT)
    squares = rows[: whole * TILE_OUT].view(whole, TILE_OUT, quads, QUAD)
    tiles[tile : tile + whole] = squares.transpose(1, 2)
    if rest:
        last = rows[whole * TILE_OUT :].view(rest, quads, QUAD)
        tiles[tile + whole, :, :rest] = last.transpose(0, 1)


def int8_tiles(values: Tensor) -> Tensor:
    """Return int8 [outputs, inputs] as tiles; memory beside them is small."""
    tiles = empty_int8_tiles(*values.shape)
    step = max(1, _SLICE_BYTES // (TILE_OUT * values.shape[1])) * TILE_OUT
    for first in range(0, values.shape[0], step):
        put_int8(tiles, first, values[first : first + step])
    return tiles


def int8_values(tiles: Tensor, outputs: int) -> Tensor:
    """Return int8 [outputs, inputs] of tiles."""
    values = tiles.transpose(1, 2).reshape(-1, tiles.shape[1] * QUAD)[:outputs]
    return (values ^ 128).view(torch.int8)


def int8_linear(
    x: Tensor, tiles: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return x W^T + b in the dtype of x: [rows, outputs].

    Rows of `x`, dense, are rounded as `ops.quantize_rows` does; sums are exact. `scales` float32
    [outputs].
    """
    out = x.new_empty(x.shape[0], scales.shape[0])
    values = torch.empty(x.shape, dtype=torch.uint8)
    _int8(x, values, torch.empty(x.shape[0]), tiles, scales, bias, out)
    return out


def int8_product(values: Tensor, x_scales: Tensor, tiles: Tensor, scales: Tensor) -> Tensor:
    """Return the product float32 of rows that are rounded already, as `ops.quantize_rows` does.

    `values` are changed.
    """
    out = torch.empty(values.shape[0], scales.shape[0])
    _int8(None, values, x_scales, tiles, scales, None, out)
    return out


def _int8(
    x: Tensor | None,
    values: Tensor,
    x_scales: Tensor,
    tiles: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    sums = torch.empty(values.shape[0], dtype=torch.int32)
    call = calls.Int8Call(
        x=None if x is None else x.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        tiles=tiles.data_ptr(),
        scales=scales.data_ptr(),
        values=values.data_ptr(),
        x_scales=x_scales.data_ptr(),
        sums=sums.data_ptr(),
        num_rows=values.shape[0],
        inputs=values.shape[1],
        outputs=out.shape[1],
    )
    dtype, isa = _DTYPES[out.dtype], calls.best_isa()
    calls.library().quire_int8(isa, dtype, call, torch.get_num_threads())


@frozen(kw_only=True)
class PackedWeight:
    """W of some outputs: (code - zero) * scale, each group of inputs with its own.

    `values` uint8 [outputs, in_features * bits / 8], `scales` float16 [num_groups, outputs] and
    `zeros` uint8 [num_groups, outputs * bits / 8], the first code in the lowest bits.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.values.shape[1] * 8 // self.bits

    def outputs(self, span: slice) -> PackedWeight:
        """Return the weight of some outputs, from an even one on, in the same memory."""
        packed = slice(span.start * self.bits // 8, -(-span.stop * self.bits // 8))
        return PackedWeight(
            values=self.values[span],
            scales=self.scales[:, span],
            zeros=self.zeros[:, packed],
            bits=self.bits,
            group_size=self.group_size,
        )


def _packed_call(weight: PackedWeight, out: Tensor) -> calls.PackedCall:
    return calls.PackedCall(
        out=out.data_ptr(),
        values=weight.values.data_ptr(),
        zeros=weight.zeros.data_ptr(),
        scales=weight.scales.data_ptr(),
        inputs=weight.in_features,
        outputs=weight.values.shape[0],
        group_size=weight.group_size,
        bits=weight.bits,
        out_stride=out.stride(0),
        value_stride=weight.values.stride(0),
        scale_group=weight.scales.stride(0),
        scale_stride=weight.scales.stride(1),
        zero_group=weight.zeros.stride(0),
        zero_stride=weight.zeros.stride(1),
    )


def write_packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, order: Tensor | None = None
) -> None:
    """Put x W^T + b into `out` [rows, outputs], which may be cut from wider rows.

    `x` [rows, in_features] with its numbers of a row side by side. `order` int32 [in_features]:
    column k of W multiplies input order[k].
    """
    isa, library, call = calls.best_isa(), calls.library(), _packed_call(weight, out)
    call.num_rows, call.x, call.x_stride = x.shape[0], x.data_ptr(), x.stride(0)
    call.bias = None if bias is None else bias.data_ptr()
    call.order = None if order is None else order.data_ptr()
    wide = torch.empty(x.shape[0], library.quire_packed_width(isa, call))
    call.wide = wide.data_ptr()
    library.quire_packed(isa, _DTYPES[x.dtype], call, torch.get_num_threads())


def write_widened(weight: PackedWeight, out: Tensor) -> None:
    """Put the weight into `out` [outputs, in_features], rounded to its dtype."""
    call, isa = _packed_call(weight, out), calls.best_isa()
    calls.library().quire_widen(isa, _DTYPES[out.dtype], call, torch.get_num_threads())
