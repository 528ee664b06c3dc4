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
from quire_kernels.packed.layout import TILE_IN, TiledWeight, group_shift

_DTYPES = {torch.bfloat16: 0, torch.float16: 1}
MAX_FEW_ROWS = 8
_TILE_OUT = 128
_MAX_SPLITS = 16
# What a block costs beside its tiles of inputs, and each split more, in tiles of inputs.
_BLOCK_COST, _SPLIT_COST = 6.0, 2.0
# Microseconds of a tile of inputs, and of each row of it, on one H200.
_INPUTS_COST, _ROW_COST = 0.27, 0.0018
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
        # For each tile that is split. A launch leaves zeros, and follows the one before.
        self._arrived = torch.zeros(4 * self._num_sms, dtype=torch.int32, device=device)

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
        tile_rows, splits = plan(x.shape[0], weight.out_features, weight.in_features, self._num_sms)
        arguments.tile_rows, arguments.splits = tile_rows, splits
        if splits > 1:
            tiles = _tiles(x.shape[0], weight.out_features, tile_rows)
            shape = (tiles, splits, tile_rows, _TILE_OUT)
            partial = torch.empty(shape, dtype=torch.float32, device=x.device)
            arguments.partial = partial.data_ptr()
            arguments.arrived = self._arrived.data_ptr()
        self._call(self._loaded.quire_packed_many_rows, arguments)
        groups = _groups_of_a_tile(weight)
        name = f"many_rows<{_type(x)}, {tile_rows}, {groups}>"
        name += "(CUtensorMap_st, quire::PackedArguments)"
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
    """Return the rows of a block's tile, and how many blocks share a tile's inputs."""
    fitting = [n for n in library.TILE_ROWS if rows <= n]
    chunks = size // TILE_IN

    def most_splits(tile_rows: int) -> int:
        is_full = _tiles(rows, num_out, tile_rows) > 2 * _slots(tile_rows, num_sms)
        return 1 if is_full else min(_MAX_SPLITS, chunks)

    def cost(choice: tuple[int, int]) -> float:
        tile_rows, splits = choice
        blocks = _tiles(rows, num_out, tile_rows) * splits
        turns = -(-blocks // _slots(tile_rows, num_sms))
        inputs = turns * (-(-chunks // splits) + _BLOCK_COST) + _SPLIT_COST * (splits > 1) * splits
        return inputs * (_INPUTS_COST + _ROW_COST * tile_rows)

    # Two tiles of the second largest take less time than two of the largest: 384 rows.
    sizes = fitting[:1] or library.TILE_ROWS[-2:]
    return min(((n, s) for n in sizes for s in range(1, most_splits(n) + 1)), key=cost)


def _slots(tile_rows: int, num_sms: int) -> int:
    """Return how many blocks are on the GPU at one time."""
    return num_sms * (2 if tile_rows <= 64 else 1)
