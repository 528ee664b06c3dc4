"""The block table of each persistent row, on the host and on the device.

The device learns of differences only, so that the work of a step does not grow with the context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.interfaces.attention import BatchLimits
from quire.scheduling.output import KVCacheGroup

Ints = NDArray[np.int32]
# For so few rows PyTorch's `index_select` has a kernel that takes them one after another on a GPU.
FEW_ROWS = 16


class BlockTables:
    """One table [max_num_seqs + 1, blocks] a group; the last row is always empty: padding's.

    On a CPU host and device share the memory.
    """

    def __init__(
        self, groups: Sequence[KVCacheGroup], limits: BatchLimits, device: torch.device
    ) -> None:
        num_rows = limits.max_num_seqs + 1
        self.block_sizes = [group.block_size for group in groups]
        self._host: list[Ints] = []
        for size in self.block_sizes:
            # Rows of 16 bytes, which are gathered fastest.
            width = (-(-limits.max_model_len // size) + 4) // 4 * 4
            self._host.append(np.zeros((num_rows, width), np.int32))
        self._lens = np.zeros((len(groups), num_rows), np.int32)
        tables = [torch.from_numpy(table) for table in self._host]
        self._shares_memory = device.type == "cpu"
        self._device = tables if self._shares_memory else [t.to(device) for t in tables]
        # (place in the flat table, block ids) since the device last heard of it, a group.
        self._changes: list[list[tuple[int, list[int]]]] = [[] for _ in groups]

    def clear(self, row: int) -> None:
        """Begin a row anew."""
        self._lens[:, row] = 0

    def append(self, group: int, row: int, block_ids: list[int]) -> None:
        """Put blocks at the end of a row's table."""
        if not block_ids:
            return
        begin = int(self._lens[group, row])
        table = self._host[group]
        table[row, begin : begin + len(block_ids)] = block_ids
        self._lens[group, row] = begin + len(block_ids)
        if not self._shares_memory:
            self._changes[group].append((row * table.shape[1] + begin, block_ids))

    def change(self, group: int, row: int, begin: int, block_ids: list[int]) -> None:
        """Let a row's table be these blocks from a place on."""
        self._lens[group, row] = begin
        self.append(group, row, block_ids)

    def slots(self, group: int, rows: Ints, positions: Ints) -> Ints:
        """Return the slot of each token: of its row's table, at its position."""
        size = np.int32(self.block_sizes[group])
        return self._host[group][rows, positions // size] * size + positions % size

    def take_changes(self) -> list[tuple[int, Ints, Ints]]:
        """Return what the device has not heard of: (group, places, block ids)."""
        found = []
        for group, changes in enumerate(self._changes):
            if changes:
                places = [np.arange(at, at + len(ids), dtype=np.int32) for at, ids in changes]
                values = [np.array(ids, np.int32) for _, ids in changes]
                found.append((group, np.concatenate(places), np.concatenate(values)))
                changes.clear()
        return found

    def tell_device(self, group: int, places: Tensor, block_ids: Tensor) -> None:
        """Enqueue the changes of a group; both int32 on the device."""
        self._device[group].view(-1).index_copy_(0, places.long(), block_ids)

    def gather(
        self, group: int, rows: Tensor, longest: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return the tables of `rows`, wide enough for `longest` tokens (None: for any length)."""
        table = self._device[group]
        if longest is not None:
            table = table[:, : -(-longest // self.block_sizes[group])]
        return gather_rows(table, rows, out=out)


def gather_rows(table: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return the given rows, integers [num_rows], of a table."""
    if len(rows) > FEW_ROWS or out is None:
        return torch.index_select(table, 0, rows, out=out)
    found: Tensor = torch.ops.aten.index.Tensor_out(table, [rows], out=out)
    return found
