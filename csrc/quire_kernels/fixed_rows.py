"""Products whose rows have the same bits however many rows there are.

A library picks its kernel, and with it the order of a sum, by the number of rows. So rows are
multiplied a fixed number at a time, the last ones with zeros beside them. Which numbers give equal
bits is not known beforehand: it is tried out once for each shape, with inputs whose large products
cancel, so that another order of a sum shows in nearly every output.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

# A product of `x` [rows, in_features], in pieces or tiles of so many rows.
Product = Callable[[Tensor, int], Tensor]
# Of a weight and a bias; a library may lay the weight out anew.
MakeProduct = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]

SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
# Rows that are tried where a piece has fewer, and different rows of the weight.
_LEAST_ROWS, _MOST_OUTPUTS = 16, 1024
# What cancels is larger by this than what is left; float16 holds its products.
_LARGE = 2.0**12
# So many numbers PyTorch shares out among a CPU's threads.
SHARED_AMONG_THREADS = 32768
# PyTorch allocates at such addresses; a library may ask for them.
_ALIGNMENT = 64


def apart_from_threads(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return an elementwise function of `x` [num_rows, size], of a row whatever else there is.

    Where a thread begins or ends is told by the number of rows; vectors end there, and what is left
    over is computed in another way.
    """
    if x.numel() < SHARED_AMONG_THREADS:
        return function(x)
    pieces = x.split(max(1, (SHARED_AMONG_THREADS - 1) // x.shape[1]))
    return torch.cat([function(piece) for piece in pieces])


def in_pieces(product: Callable[[Tensor], Tensor], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the product of `x` [num_rows, in_features] by pieces of `sizes` rows, ascending."""
    num_rows, largest = x.shape[0], sizes[-1]
    if num_rows in sizes:
        return product(_aligned(x))
    found, done = [], 0
    while num_rows - done >= largest:
        found.append(product(_aligned(x[done : done + largest])))
        done += largest
    left = num_rows - done
    if left or not found:
        size = next(n for n in sizes if n >= left)
        padded = x.new_zeros(size, x.shape[1])
        padded[:left] = x[done:]
        found.append(product(padded)[:left])
    return found[0] if len(found) == 1 else torch.cat(found)


def _aligned(x: Tensor) -> Tensor:
    is_plain = x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0
    return x if is_plain else x.clone(memory_format=torch.contiguous_format)


def equal_sizes(product: Product, x: Tensor, candidates: Sequence[int] = SIZES) -> tuple[int, ...]:
    """Return the sizes, ascending, that give rows of `x` the same bits at every place of a piece.

    `candidates` are in descending order; the last of them where no other has equals.
    """
    for largest in candidates[:-1]:
        rows = x[:largest]
        whole = product(rows, largest)
        shifts = {1, 3, largest // 2} - {largest}
        if all(_same(product(rows.roll(n, 0), largest).roll(-n, 0), whole) for n in shifts):
            found = [size for size in candidates if _is_equal(product, rows, size, whole)]
            return tuple(sorted(found))
    return (candidates[-1],)


def _is_equal(product: Product, rows: Tensor, size: int, whole: Tensor) -> bool:
    if size > len(rows):
        return False
    tried = min(len(rows), max(2 * size, _LEAST_ROWS))
    return _same(product(rows[:tried], size), whole[:tried])


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a == b).all())


def trial(shape: tuple[int, int], dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
    """Return `x` [256, in_features] and a weight of `shape` that tell the order of sums.

    Half of the columns come in pairs whose products are large and cancel; they lie anywhere.
    """
    (num_out, size), generator = shape, torch.Generator().manual_seed(7)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    x, weight = normal(SIZES[0], size), normal(min(num_out, _MOST_OUTPUTS), size)
    first, second = torch.randperm(size, generator=generator)[: size // 4 * 2].view(2, -1)
    x[:, first] *= _LARGE
    x[:, second] = -x[:, first]
    weight[:, second] = weight[:, first]
    repeats = -(-num_out // len(weight))
    weight = weight.to(device, dtype).repeat(repeats, 1)[:num_out].contiguous()
    return x.to(device, dtype), weight


@functools.cache
def sizes_on_cpu(
    make: MakeProduct, shape: tuple[int, int], dtype: torch.dtype, biased: bool, num_threads: int
) -> tuple[int, ...]:
    """Return in pieces of how many rows `make`'s products of a weight of `shape` are equal."""
    assert num_threads == torch.get_num_threads(), num_threads
    x, weight = trial(shape, dtype, "cpu")
    product = make(weight, _bias(shape[0], dtype, "cpu") if biased else None)
    return equal_sizes(
        lambda rows, size: torch.cat([product(_aligned(part)) for part in rows.split(size)]), x
    )


@functools.cache
def sizes_on_gpu(
    shape: tuple[int, int], dtype: torch.dtype, biased: bool, device: torch.device
) -> tuple[int, ...]:
    """Return in tiles of how many rows the Triton kernel gives equal bits."""
    kernels = _kernels()
    x, weight = trial(shape, dtype, device)
    bias = _bias(shape[0], dtype, device) if biased else None
    return equal_sizes(
        lambda rows, size: kernels.linear(rows, weight, bias, size), x, kernels.tiles(dtype)
    )


def in_tiles(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """Return x W^T + b on a GPU, in tiles of one of `sizes` rows, ascending."""
    rows = next((size for size in sizes if size >= x.shape[0]), sizes[-1])
    out: Tensor = _kernels().linear(x, weight, bias, rows)
    return out


def serves(device: str) -> bool:
    """Answer whether products can be made fixed on a device: a GPU's need Triton."""
    return device == "cpu" or importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("quire_kernels.fixed_tiles")


def _bias(size: int, dtype: torch.dtype, device: Any) -> Tensor:
    return torch.linspace(-1, 1, size).to(device, dtype)


def plain(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return PyTorch's product."""
    return lambda x: functional.linear(x, weight, bias)
