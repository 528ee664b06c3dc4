"""`rotate_and_write` and `write_kv`, PyTorch bodies and Triton kernels, against their steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attrs import frozen
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, check, draw
from torch import Tensor

from quire_kernels import ops

pytest.importorskip("triton")
from quire_kernels import rotary as kernel

NUM_BLOCKS = 10
# On a GPU the first is the kernel too, by way of the choice in `ops`.
BODIES = pytest.mark.parametrize("body", [ops.rotate_and_write, kernel.rotate_and_write])
# (head_dim, rotary_dim), no rotation where it is 0.
DIMS = [(16, 16), (20, 8), (64, 64), (80, 80), (128, 32), (24, 0)]
QUICK = settings(
    max_examples=20, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)


@frozen(kw_only=True)
class Case:
    """Random inputs of a step; `head_dim`s that are no power of two have dimensions masked."""

    heads: tuple[int, int]
    dims: tuple[int, int]
    has_norm: bool
    dtype: torch.dtype
    num_tokens: int = 3
    block_size: int = 4

    @property
    def qkv(self) -> Tensor:
        return draw(
            self.num_tokens, (self.heads[0] + 2 * self.heads[1]) * self.dims[0], dtype=self.dtype
        )

    @property
    def positions(self) -> Tensor:
        return torch.arange(7, 7 + 3 * self.num_tokens, 3, dtype=torch.int32, device=DEVICE)

    @property
    def slots(self) -> Tensor:
        order = torch.randperm(
            NUM_BLOCKS * self.block_size, generator=torch.Generator().manual_seed(5)
        )
        return order[: self.num_tokens].to(DEVICE, torch.int32)

    @property
    def rotary(self) -> tuple[Tensor, Tensor] | None:
        angles = 3 * draw(50, self.dims[1] // 2, seed=1)
        return (angles.cos(), angles.sin()) if self.dims[1] else None

    @property
    def norm(self) -> tuple[Tensor, Tensor, float] | None:
        q, k = (draw(self.dims[0], dtype=self.dtype, seed=seed) for seed in (2, 3))
        return (q, k, 1e-5) if self.has_norm else None

    def cache(self) -> Tensor:
        """Return [num_blocks, num_kv_heads, block_size, 2 * head_dim] of NaN."""
        shape = (NUM_BLOCKS, self.heads[1], self.block_size, 2 * self.dims[0])
        return torch.full(shape, float("nan"), dtype=self.dtype, device=DEVICE)

    def steps(self, dtype: torch.dtype) -> list[Tensor]:
        """Return q, k and v as the separate steps make them in `dtype`."""
        heads = self.qkv.to(dtype).unflatten(1, (-1, self.dims[0]))
        q, k, v = heads.split((self.heads[0], self.heads[1], self.heads[1]), dim=1)
        if self.norm is not None:
            q, k = (
                x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.to(dtype)
                for x, weight in zip((q, k), self.norm[:2], strict=True)
            )
        if self.rotary is not None:
            cos, sin = (
                x[self.positions.long(), None].to(self.dtype).to(dtype) for x in self.rotary
            )
            q, k = turned(q, cos, sin), turned(k, cos, sin)
        return [q, k, v]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def written(body: Callable[..., Tensor], case: Case) -> tuple[Tensor, Tensor]:
    """Return q and the cache as the body leaves them."""
    cache, qkv = case.cache(), case.qkv
    kept, tokens = qkv.clone(), cache.transpose(1, 2)
    views = tokens[..., : case.dims[0]], tokens[..., case.dims[0] :]
    given_ = {"rotary": case.rotary, "norm": case.norm}
    q = body(qkv, case.positions, case.slots, *views, **given_)
    assert torch.equal(qkv, kept)
    return q, cache


@BODIES
@given(
    st.sampled_from([(1, 1), (4, 2), (7, 1), (12, 3)]),
    st.sampled_from(DIMS),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 4, 16]),
)
@QUICK
def test_queries_and_written_tokens_are_within_the_bound(
    body: Callable[..., Tensor],
    heads: tuple[int, int],
    dims: tuple[int, int],
    has_norm: bool,
    dtype: torch.dtype,
    block_size: int,
) -> None:
    case = Case(heads=heads, dims=dims, has_norm=has_norm, dtype=dtype, block_size=block_size)

    q, cache = written(body, case)

    rows = cache.transpose(1, 2).flatten(0, 1)[case.slots.long()]
    found = [q, *rows.split(dims[0], dim=-1)]
    for out, exact, plain in zip(found, case.steps(torch.float64), case.steps(dtype), strict=True):
        check(out, exact, plain)


@BODIES
def test_nothing_is_written_beside_the_slots(body: Callable[..., Tensor]) -> None:
    case = Case(heads=(4, 2), dims=(20, 8), has_norm=True, dtype=torch.float32)

    _, cache = written(body, case)

    tokens = cache.isnan().logical_not().any(-1).any(1).flatten().nonzero().flatten()
    assert tokens.tolist() == case.slots.sort().values.tolist()
    assert cache.isnan().sum() == cache.numel() - case.num_tokens * 2 * 2 * 20


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_rounds_where_the_separate_steps_do(
    dims: tuple[int, int], dtype: torch.dtype
) -> None:
    case = Case(heads=(4, 2), dims=dims, has_norm=True, dtype=dtype, num_tokens=9)
    moved = [x.cpu() for x in (case.qkv, case.positions, case.slots)]
    cache = case.cache().cpu()
    tokens = cache.transpose(1, 2)
    rotary = case.rotary and tuple(x.cpu() for x in case.rotary)
    norm = case.norm and (case.norm[0].cpu(), case.norm[1].cpu(), case.norm[2])
    views = tokens[..., : dims[0]], tokens[..., dims[0] :]
    plain = ops.rotate_and_write(*moved, *views, rotary=rotary, norm=norm)

    q, found = written(kernel.rotate_and_write, case)

    # All but the last bit of a norm that falls between two numbers.
    same = (q.cpu() == plain).double().mean(), (found.cpu() == cache).double().sum()
    assert same[0] > 0.98
    assert same[1] > 0.98 * cache.isnan().logical_not().sum()


FLOATS_OF_8_BITS = pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])


def tricky(num_tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Return numbers of all sizes, NaN, infinities and zeros; tokens differ by powers of ten."""
    sizes = 10.0 ** torch.linspace(-6, 4, num_tokens, device=DEVICE)
    found = (draw(num_tokens, heads, dim, dtype=torch.float32) * sizes[:, None, None]).to(dtype)
    found[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    return found


def stored_by_pytorch(x: Tensor, scale: Tensor, stored: torch.dtype) -> Tensor:
    largest = torch.finfo(stored).max
    return (x.cpu().float() / scale.cpu()[:, None]).clamp(-largest, largest).to(stored)


def same_numbers(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found.cpu().double().nan_to_num(7e7), wanted.double().nan_to_num(7e7))


@FLOATS_OF_8_BITS
@pytest.mark.parametrize("write", [ops.write_kv, kernel.write_kv])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_tokens_are_the_nearest_numbers_and_clipped(
    write: Callable[..., None], dtype: torch.dtype, stored: torch.dtype
) -> None:
    k, v = tricky(9, 3, 20, dtype), tricky(9, 3, 24, dtype).flip(0)
    scales = tuple(torch.tensor(x, device=DEVICE) for x in ([0.02, 1.0, 0.3], [3.0, 0.001, 0.07]))
    cache = torch.full((4, 3, 4, 44), float("nan"), device=DEVICE, dtype=stored)
    tokens = cache.transpose(1, 2)
    slots = torch.tensor([5, 2, 15, 8, 9, 0, 12, 3, 6], dtype=torch.int32, device=DEVICE)

    write(k, v, slots, tokens[..., :20], tokens[..., 20:], scales=scales)

    rows = tokens.flatten(0, 1).cpu()[slots.cpu().long()]
    assert same_numbers(rows[..., :20], stored_by_pytorch(k, scales[0], stored))
    assert same_numbers(rows[..., 20:], stored_by_pytorch(v, scales[1], stored))
    others = [slot for slot in range(16) if slot not in slots.tolist()]
    assert tokens.flatten(0, 1).cpu()[others].double().isnan().all()


@FLOATS_OF_8_BITS
@BODIES
def test_rotated_keys_and_values_are_stored_by_the_scales_of_their_heads(
    body: Callable[..., Tensor], stored: torch.dtype
) -> None:
    case = Case(heads=(6, 3), dims=(20, 8), has_norm=True, dtype=torch.bfloat16, num_tokens=9)
    scales = tuple(torch.tensor(x, device=DEVICE) for x in ([0.02, 1.0, 0.3], [3.0, 0.001, 0.07]))
    given_ = {"rotary": case.rotary, "norm": case.norm}
    places = (case.qkv, case.positions, case.slots)
    wide = case.cache().transpose(1, 2)
    q = body(*places, wide[..., :20], wide[..., 20:], **given_)
    narrow = case.cache().to(stored).transpose(1, 2)

    found = body(*places, narrow[..., :20], narrow[..., 20:], scales=scales, **given_)

    assert torch.equal(found, q)
    slots = case.slots.cpu().long()
    rows, wanted = (x.flatten(0, 1).cpu()[slots] for x in (narrow, wide))
    assert same_numbers(rows[..., :20], stored_by_pytorch(wanted[..., :20], scales[0], stored))
    assert same_numbers(rows[..., 20:], stored_by_pytorch(wanted[..., 20:], scales[1], stored))


@pytest.mark.parametrize("write", [ops.write_kv, kernel.write_kv])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_written_tokens_without_scales_are_the_given_bits(
    write: Callable[..., None], num_tokens: int
) -> None:
    k, v = (tricky(5, 3, 16, torch.bfloat16)[:num_tokens] for _ in range(2))
    cache = torch.zeros(4, 3, 4, 32, device=DEVICE, dtype=torch.bfloat16)
    tokens = cache.transpose(1, 2)
    slots = torch.tensor([5, 2, 15, 8, 9][:num_tokens], dtype=torch.int32, device=DEVICE)

    write(k, v, slots, tokens[..., :16], tokens[..., 16:])

    rows = tokens.flatten(0, 1)[slots.long()]
    assert torch.equal(rows.view(torch.int16), torch.cat((k, v), dim=-1).view(torch.int16))


def test_nothing_is_done_for_no_tokens() -> None:
    case = Case(heads=(4, 2), dims=(16, 16), has_norm=True, dtype=torch.float32, num_tokens=0)

    q, cache = written(kernel.rotate_and_write, case)

    assert q.shape == (0, 4, 16)
    assert cache.isnan().all()
