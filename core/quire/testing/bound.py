"""The bound of every kind: twice the error of plain PyTorch, plus one rounding unit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor

# So much closer is looked where an error is just beyond the bound.
ROUNDS = 24


def bound(error: float, unit: float, plain_error: Callable[[int], float]) -> float:
    """Return what an error may be; plain PyTorch's is looked at as closely as the verdict needs.

    `unit` is one rounding at the reference's magnitude. `plain_error(rounds)` is the worst error of
    plain PyTorch, in `rounds` times as many ways to add the same numbers up.
    """
    if error <= unit:
        return unit
    allowed = unit + 2 * plain_error(1)
    # Just beyond the bound, it may be plain PyTorch that was lucky.
    if allowed < error <= 4 * allowed:
        allowed = unit + 2 * plain_error(ROUNDS)
    return allowed


def unit_of(dtype: torch.dtype, exact: Tensor) -> float:
    """Return one rounding unit of a dtype at the magnitude of `exact`, or its smallest number."""
    numbers = torch.finfo(dtype)
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return numbers.eps * max(largest, numbers.smallest_normal)


@frozen(kw_only=True)
class Wrong:
    """The first element that is beyond the bound, in words, and all that are."""

    words: str
    mask: Tensor


def first_beyond(
    found: Tensor, exact: Tensor, allowed: float | Tensor, axes: tuple[str, ...]
) -> Wrong | None:
    """Return the first element that is wrong; None if there is none. `axes` name the dimensions."""
    difference = (found.double() - exact).abs()
    mask = ~(difference <= allowed)
    if not bool(mask.any()):
        return None
    at = tuple(mask.nonzero()[0].tolist())
    limit = allowed[at].item() if isinstance(allowed, Tensor) else allowed
    where = ", ".join(f"{axis} {index}" for axis, index in zip(axes, at, strict=True))
    words = (
        f"{where}: got {found[at].item():.6g}, expected {exact[at].item():.6g}, "
        f"bound {limit:.3g}; {int(mask.sum())} of {mask.numel()} elements are wrong"
    )
    return Wrong(words=words, mask=mask)


def bits(x: Tensor) -> Tensor:
    """Return the bytes of a tensor, so that a NaN equals itself."""
    if not x.numel():
        return torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    return x.contiguous().view(torch.uint8)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Answer whether two tensors hold the same bytes."""
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(bits(x), bits(y))


def leave_poison(*shape: int, dtype: torch.dtype, device: str) -> None:
    """Leave NaN in memory that the next output of this size is likely to get."""
    torch.full(shape, float("nan"), dtype=dtype, device=device)
