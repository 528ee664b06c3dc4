"""Products whose columns are cut into parts: what the programs of a tile leave for the last one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TILES = 1024
_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def sum_of_parts(part_ptr, at, inside, num_parts, part_stride):
    """Add up what the programs of a tile left, part after part."""
    sums = tl.load(part_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    for part in range(1, num_parts):
        more = part_ptr + part * part_stride + at
        sums += tl.load(more, mask=inside, other=0.0, cache_modifier=".cg")
    return sums


def counters(device: torch.device, address: int) -> Tensor:
    """Return counters that are zero between launches, for the products with the weight there.

    Launches that read the same weight are behind one another in a stream; those of two models may
    overlap. Whatever weight is at an address later finds zeros again. A CUDA graph that is
    captured before any launch gets counters of its own, which it clears in each replay.
    """
    found = _COUNTERS.get((device, address))
    if found is None:
        found = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _COUNTERS[device, address] = found
    return found
