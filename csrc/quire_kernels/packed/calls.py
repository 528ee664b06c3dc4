"""Launches of the compiled kernels: arguments, tiles, and blocks that share a tile's inputs."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from quire.errors import KernelError
from quire_kernels import costs
from quire_kernels.packed import library
from quire_kernels.packed.layout import TiledWeight, group_shift

_DTYPES = {torch.bfloat16: 0, torch.float16: 1}
MAX_FEW_ROWS = 8
# Outputs of a tile of `many_rows`, and inputs of a unit of one.
_TILE_OUT, _UNIT_IN = 128, 128
# Microseconds on one H100, fitted to 13 numbers of rows through the products of Llama-3.1-8B: a
# unit, each row of it more, and its square; a turn of tiles; what it costs that blocks share tiles,
# and each block that shares one; each row, where blocks end with tiles and where they do not.
_UNIT, _UNIT_ROW, _UNIT_SQUARE, _TURN = 0.497, 0.00214, 6.15e-6, 1.02
_SHARED, _SHARER, _SHARED_ROW, _CUT_ROW = 3.6, 0.748, 0.0101, 0.0437
Norm = tuple[Tensor, Tensor, float]


@functools.cache
def kernels(device: torch.device) -> Kernels | None:
    """Return the kernels of a GPU, None where they are not built."""
    capability = torch.cuda.get_device_capability(device)
    loaded = library.load(capability)
    return None if loaded is None else Kernels(loaded, device, capability == library.HOPPER)


class Kernels:
    """The library on one GPU. Launches neither wait nor read anything back."""

    def __init__(self, loaded: ctypes.CDLL, device: torch.device, is_hopper: bool) -> None:
        self._loaded = loaded
        self._device = device
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        with torch.cuda.device(device):
            self._shared_bytes = loaded.quire_packed_shared_bytes()
        self.has_many_rows = is_hopper
        # For each block that begins a tile. A launch leaves zeros, and follows the one before.
        self._arrived = torch.zeros(2 * self._num_sms, dtype=torch.int32, device=device)

    def takes_few_rows(self, x: Tensor, weight: TiledWeight, parts: int = 1) -> bool:
        """Answer whether `few_rows` takes these rows: they and a tile's sums have room."""
        rows, size = x.shape
        # See `few_rows_bytes` and `tile_sum_bytes` in few_rows.cuh.
        stride = -(-size // 128) * 128 + 8
        ring = 80 * (1024 + 48 * _groups_of_a_step(weight))
        shared = rows * (2 * stride + 1280 * parts) + 16 + 512 + ring
        return rows <= MAX_FEW_ROWS and shared <= self._shared_bytes

    def few_rows(
        self,
        x: Tensor,
        weight: TiledWeight,
        bias: Tensor | None,
        out: Tensor,
        *,
        norm: Norm | None = None,
        gated: bool = False,
    ) -> Tensor:
        """Write the product of up to 8 rows into `out`, and return the sum that was normed.

        `norm` is a residual, the weight and epsilon of the norm of the sum. `gated`: silu of the
        first half of the outputs times the second.
        """
        arguments = self._arguments(x, weight, bias, out)
        arguments.gated = gated
        total = x
        if norm is not None:
            residual, norm_weight, arguments.eps = norm
            total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            arguments.residual = residual.data_ptr()
            arguments.residual_stride = residual.stride(0)
            arguments.norm, arguments.total = norm_weight.data_ptr(), total.data_ptr()
        self._call(self._loaded.quire_packed_few_rows, arguments)
        kind = f"{_type(x)}, {_groups_of_a_step(weight)}, {1 + gated}"
        name = f"few_rows<{kind}>(quire::PackedArguments)"
        costs.tell(lambda: _cost(name, x, weight, out))
        return total

    def many_rows(
        self,
        x: Tensor,
        weight: TiledWeight,
        bias: Tensor | None,
        out: Tensor,
        *,
        gated: bool = False,
    ) -> None:
        """Write the product of any number of rows into `out`; `gated` as in `few_rows`."""
        arguments = self._arguments(x, weight, bias, out)
        arguments.gated = gated
        tile_rows, blocks = plan(x.shape[0], weight.out_features, weight.in_features, self._num_sms)
        arguments.tile_rows, arguments.blocks = tile_rows, blocks
        tiles = _tiles(x.shape[0], weight.out_features, tile_rows)
        if blocks != tiles:
            # A block leaves sums of the tile that it begins with; of that which it ends with too
            # where others end with it.
            shape = (2 if tiles < blocks else 1, blocks, tile_rows, _TILE_OUT)
            partial = torch.empty(shape, dtype=torch.float32, device=x.device)
            arguments.partial = partial.data_ptr()
            arguments.arrived = self._arrived.data_ptr()
        self._call(self._loaded.quire_packed_many_rows, arguments)
        groups = 4 if group_shift(weight) < 7 else 1
        name = f"many_rows<{_type(x)}, {tile_rows}, {groups}>"
        name += "(CUtensorMap_st, quire::PackedArguments, quire::Shares)"
        costs.tell(lambda: _cost(name, x, weight, out))

    def widen(self, weight: TiledWeight, dtype: torch.dtype) -> Tensor:
        """Return the weight [out_features, in_features], rounded to the dtype."""
        shape = (weight.out_features, weight.in_features)
        wide = torch.empty(shape, dtype=dtype, device=self._device)
        arguments = self._arguments(wide, weight, None, wide)
        self._call(self._loaded.quire_packed_widen, arguments)
        kind = f"{_type(wide)}, {_groups_of_a_tile(weight)}"
        name = f"widen<{kind}>(quire::PackedArguments)"
        costs.tell(lambda: {**_cost(name, wide[:0], weight, wide), "flops": 0})
        return wide

    def _arguments(
        self, x: Tensor, weight: TiledWeight, bias: Tensor | None, out: Tensor
    ) -> library.Arguments:
        return library.Arguments(
            x=x.data_ptr(),
            tiles=weight.tiles.data_ptr(),
            scales=weight.scales.data_ptr(),
            zeros=weight.zeros.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            out=out.data_ptr(),
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            scale_stride=weight.scales.stride(0),
            zero_stride=weight.zeros.stride(0),
            rows=x.shape[0],
            num_out=weight.out_features,
            in_features=weight.in_features,
            group_shift=group_shift(weight),
            dtype=_DTYPES[x.dtype],
            has_short_scales=weight.has_short_scales,
            num_sms=self._num_sms,
        )

    def _call(self, entry: Any, arguments: library.Arguments) -> None:
        """Launch on the current stream. Raises: KernelError with the runtime's words."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        error = entry(ctypes.byref(arguments), stream)
        if error:
            text = self._loaded.quire_packed_error(error).decode()
            raise KernelError(
                f"a product with packed weights of {arguments.in_features} -> "
                f"{arguments.num_out}, {arguments.rows} rows: a launch failed: {text}. "
                f"If the GPU's memory is full, lower --gpu-memory-utilization."
            )


def _groups_of_a_tile(weight: TiledWeight) -> int:
    return 2 if weight.group_size == 32 else 1


def _groups_of_a_step(weight: TiledWeight) -> int:
    return {32: 4, 64: 2}.get(weight.group_size, 1)


def _type(x: Tensor) -> str:
    return "__nv_bfloat16" if x.dtype == torch.bfloat16 else "__half"


def _cost(name: str, x: Tensor, weight: TiledWeight, out: Tensor) -> dict[str, Any]:
    tensors = (x, weight.tiles, weight.scales, weight.zeros, out)
    return {
        "name": f"void quire::{name}",
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "flops": 2 * x.numel() * weight.out_features,
    }


def _tiles(rows: int, num_out: int, tile_rows: int) -> int:
    return -(-rows // tile_rows) * -(-num_out // _TILE_OUT)


@functools.cache
def plan(rows: int, num_out: int, size: int, num_sms: int) -> tuple[int, int]:
    """Return the rows of a tile, and the blocks that share all tiles' units."""
    fitting = [n for n in library.TILE_ROWS if rows <= n][:1]
    units = -(-size // _UNIT_IN)

    def choices(tile_rows: int) -> set[int]:
        tiles = _tiles(rows, num_out, tile_rows)
        most = min(num_sms, tiles * units)
        return {tiles, most, *range(2 * tiles, most + 1, tiles)}

    def cost(choice: tuple[int, int]) -> float:
        tile_rows, blocks = choice
        tiles = _tiles(rows, num_out, tile_rows)
        unit = _UNIT + (_UNIT_ROW + _UNIT_SQUARE * tile_rows) * tile_rows
        if blocks == tiles:
            return -(-tiles // num_sms) * (units * unit + _TURN)
        each = -(-tiles * units // blocks)
        row = _CUT_ROW if blocks % tiles else _SHARED_ROW
        return each * unit + _SHARED + _SHARER * units / each + row * tile_rows

    pairs = ((n, blocks) for n in fitting or library.TILE_ROWS[4:] for blocks in choices(n))
    return min(sorted(pairs), key=cost)
