"""Copy tensors from mapped files: for a CPU, where this takes no memory but the model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.execution.checkpoint import TensorInfo, cannot_hold, not_finite, wrong_kind

# Finiteness is checked in slices, so that its temporary memory stays small.
CHECKED_ELEMENTS = 1 << 22


class MappedFiles:
    """Fill tensors in the order of `tensors`; each is checked at once."""

    def __init__(self, tensors: Sequence[TensorInfo], device: torch.device) -> None:
        self._opened: Path | None = None
        self._reader: Any = None

    def fill(self, tensor: TensorInfo, target: Tensor) -> None:
        """Copy a tensor. Raises: CheckpointError if it is of another kind or not finite."""
        data = self._view(tensor)
        if data.is_floating_point() != target.is_floating_point():
            raise wrong_kind(tensor, str(target.dtype))
        target.copy_(data)
        if not target.is_floating_point() or _is_finite(target):
            return
        if _is_finite(data):
            raise cannot_hold(tensor, str(target.dtype))
        raise not_finite(tensor)

    def _view(self, tensor: TensorInfo) -> Tensor:
        from safetensors import safe_open

        if tensor.file != self._opened:
            self._opened = tensor.file
            self._reader = safe_open(tensor.file, framework="pt", device="cpu").__enter__()
        found: Tensor = self._reader.get_tensor(tensor.stored_name or tensor.name)
        return found

    def check(self) -> None:
        """Do nothing: every tensor was checked when it was copied."""

    def close(self) -> None:
        """Let go of the last file."""
        self._reader = None


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return all(not bool(_is_extreme(p).any()) for p in tensor.split(_rows_a_piece(tensor)))
    # One pass without temporary memory; only a sum that overflows needs the exact check.
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return True
    pieces = tensor.split(_rows_a_piece(tensor)) if tensor.dim() else (tensor,)
    return all(bool(torch.isfinite(piece).all()) for piece in pieces)


def _rows_a_piece(tensor: Tensor) -> int:
    return max(1, CHECKED_ELEMENTS // max(1, tensor[0].numel())) if tensor.dim() else 1


def _is_extreme(tensor: Tensor) -> Tensor:
    """Find what is not finite by its bits: 3.4 ms against 82 ms of widening (4 M, one core)."""
    mask = 0x7F if tensor.dtype == torch.float8_e4m3fn else 0x7C
    return (tensor.view(torch.uint8) & mask) == mask
