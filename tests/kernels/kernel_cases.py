"""What the tests of kernels share: random tensors, poisoned memory and the bound of Numerics."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return normal random numbers on the device under test."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> None:
    """Leave NaN in memory that the next output of this size is likely to get."""
    torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def check(out: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Fail unless the error is at most twice plain PyTorch's, plus one rounding unit."""
    assert out.dtype is plain.dtype
    unit = torch.finfo(out.dtype).eps * exact.abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + unit
    assert (out.double() - exact).abs().max() <= allowed
