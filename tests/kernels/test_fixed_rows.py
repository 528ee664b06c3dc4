"""Products whose rows do not depend on their number, on this processor and in Triton."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, check, draw, poison
from torch import Tensor

from quire_kernels import fixed_rows

SHAPES = [(64, 48), (5, 7), (300, 129), (33, 1), (1, 200), (96, 512)]


def product_of(weight: Tensor, bias: Tensor | None) -> fixed_rows.Product:
    return lambda x, _size: functional.linear(x, weight, bias)


def in_order(terms: Tensor) -> Tensor:
    """Sum the last dimension from its first term to its last, in float32."""
    total = terms[..., 0]
    for term in terms.unbind(-1)[1:]:
        total = total + term
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_have_the_same_bits_in_any_number(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = draw(*shape, dtype=dtype).cpu()
    threads = torch.get_num_threads()
    sizes = fixed_rows.sizes_on_cpu(fixed_rows.plain, shape, dtype, False, threads)
    x = draw(700, shape[1] + 1, dtype=dtype, seed=1).cpu()[:, 1:]  # nowhere aligned

    def multiply(rows: Tensor) -> Tensor:
        return fixed_rows.in_pieces(fixed_rows.plain(weight, None), rows, sizes)

    whole = multiply(x)

    for first, count in ((0, 1), (3, 2), (5, 16), (100, 257), (699, 1), (1, 699)):
        assert torch.equal(multiply(x[first : first + count]), whole[first : first + count])
    assert multiply(x[:0]).shape == (0, shape[0])
    check(whole, x.double() @ weight.double().T, functional.linear(x, weight))


def test_sizes_whose_sums_have_another_order_are_left_out() -> None:
    x, weight = fixed_rows.trial((40, 96), torch.float32, "cpu")

    def product(rows: Tensor, size: int) -> Tensor:
        """Sum from the other end where there are fewer than 16 rows."""
        a, b = (rows, weight) if size >= 16 else (rows.flip(1), weight.flip(1))
        return torch.stack([in_order(row * b) for row in a])

    assert fixed_rows.equal_sizes(product, x) == (16, 32, 64, 128, 256)


def test_sizes_where_the_place_decides_are_left_out() -> None:
    x, weight = fixed_rows.trial((40, 96), torch.float32, "cpu")

    def product(rows: Tensor, size: int) -> Tensor:
        """Sum the last row of a piece of four or more from the other end."""
        found = []
        for i, row in enumerate(rows):
            turned = size >= 4 and i % size == size - 1
            found.append(in_order((row * weight).flip(1 if turned else ())))
        return torch.stack(found)

    assert fixed_rows.equal_sizes(product, x) == (1, 2)


def test_trial_tells_orders_apart_in_16_bits_too() -> None:
    x, weight = fixed_rows.trial((64, 96), torch.bfloat16, "cpu")
    wide = x[:16, None].float() * weight.float()

    forth, back = in_order(wide), in_order(wide.flip(2))

    assert (forth.bfloat16() != back.bfloat16()).float().mean() > 0.02
    assert x.abs().max() * weight.abs().max() < torch.finfo(torch.float16).max


@given(
    st.sampled_from([1, 2, 15, 16, 17, 40]),
    st.sampled_from([(64, 64), (70, 96), (8, 33), (5, 7)]),
    st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
)
@settings(max_examples=16, deadline=None)
def test_tiles_are_within_the_bound(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    tiles = pytest.importorskip("quire_kernels.fixed_tiles")
    weight = (draw(*shape, seed=1) * shape[1] ** -0.5).to(dtype)
    x, bias = (
        draw(num_rows, shape[1], dtype=dtype),
        draw(shape[0], dtype=dtype) if has_bias else None,
    )
    exact = functional.linear(x.double(), weight.double(), bias.double() if has_bias else None)  # type: ignore[union-attr]
    poison(num_rows, shape[0], dtype=dtype)

    for rows in tiles.tiles(dtype):
        check(tiles.linear(x, weight, bias, rows), exact, functional.linear(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="asks a GPU for its own order of sums")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 3072), (130, 100), (6144, 1024)])
def test_tiles_of_every_size_give_the_same_bits_on_a_gpu(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    from quire_kernels import fixed_tiles

    sizes = fixed_rows.sizes_on_gpu(shape, dtype, True, torch.device("cuda", 0))
    x, weight, bias = draw(300, shape[1], dtype=dtype), draw(*shape, dtype=dtype), None

    whole = fixed_rows.in_tiles(x, weight, bias, sizes)

    assert sizes == tuple(sorted(fixed_tiles.tiles(dtype)))
    for first, count in ((0, 1), (3, 2), (5, 16), (100, 33), (299, 1), (1, 129)):
        part = fixed_rows.in_tiles(x[first : first + count], weight, bias, sizes)
        assert torch.equal(part, whole[first : first + count])
