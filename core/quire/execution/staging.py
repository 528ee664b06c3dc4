"""Pinned memory through which what the host knows reaches the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.execution.block_tables import Ints


def to_device(values: Any, dtype: torch.dtype, device: str) -> Tensor:
    """Return a small tensor on the device, without waiting for what runs there."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Staging:
    """One buffer a step in flight; each is written again only after its step was collected."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._device = device
        self._pinned: list[Tensor | None] = [None] * num_slots

    def upload(self, parts: Sequence[Ints], slot: int, into: Tensor | None = None) -> Tensor:
        """Return all parts end to end on the device, int32, in `into`'s memory where given."""
        size = sum(map(len, parts))
        if self._device.type == "cpu":
            packed = torch.from_numpy(np.concatenate(parts))
            return packed if into is None else into[:size].copy_(packed)
        pinned = self._pinned[slot]
        if pinned is None or len(pinned) < size:
            pinned = torch.empty(2 * size, dtype=torch.int32, pin_memory=True)
            self._pinned[slot] = pinned
        np.concatenate(parts, out=pinned.numpy()[:size])
        if into is None:
            return pinned[:size].to(self._device, non_blocking=True)
        return into[:size].copy_(pinned[:size], non_blocking=True)
