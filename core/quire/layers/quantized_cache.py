"""What a quantized KV cache stores for a key or value, and what that stands for: the formula."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a cache of `dtype` stores of `x` [..., num_kv_heads, dim].

    `scale` float32 [num_kv_heads]. Numbers beyond the dtype's range become its largest, infinities
    too; a NaN stays a NaN.
    """
    largest = torch.finfo(dtype).max
    return (x.float() / scale[:, None]).clamp_(-largest, largest).to(dtype)


def dequantize(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `stored` [..., num_kv_heads, dim] stands for, in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (stored.to(wide) * scale[:, None].to(wide)).to(dtype)


def as_stored(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what is read back of `x`, in float64 where it has scales, else in `dtype`."""
    if scale is None:
        return x.to(dtype)
    return dequantize(quantize(x, scale, dtype), scale, torch.float64)


def as_bytes(x: Tensor) -> Tensor:
    """Return numbers of 8 bits as bytes, others as they are: not all devices index the former."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
