"""Tiles of the sequences with several tokens: cut on the host, once a step."""

from __future__ import annotations

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from quire.interfaces.attention import AttentionSpec, BatchLimits, GraphSupport
from quire.interfaces.batch import Batch


@frozen
class TileCut:
    """How sequences are cut for one group of layers: `step` tokens a tile."""

    step: int

    @classmethod
    def of(cls, spec: AttentionSpec, tile_rows: int) -> TileCut:
        """Return the cut for tiles of so many (token, head) rows."""
        return cls(tile_rows // (spec.num_heads // spec.num_kv_heads))

    def most(self, num_tokens: int, num_seqs: int) -> int:
        """Return the most tiles of so many tokens: a tile has tokens of one sequence."""
        return -(-num_tokens // self.step) + num_seqs

    def entries(self, limits: BatchLimits) -> tuple[int, int, int]:
        """Return the shape of the lists: those of the slots, then that of captured steps."""
        most = self.most(limits.max_num_batched_tokens, limits.max_num_seqs)
        return limits.max_steps_in_flight + 2, 1 + most, 2

    def list_of(self, batch: Batch) -> np.ndarray:
        """Return the number of tiles, then (sequence, first token) of each, most keys first."""
        single = batch.num_single_token_seqs
        query_lens = np.array(batch.query_lens[single:], np.int64)
        pasts = np.array(batch.seq_lens_bound[single : len(batch.query_lens)], np.int64)
        pasts -= query_lens
        counts = -(-query_lens // self.step)
        owners = np.repeat(np.arange(len(counts)), counts)
        firsts = (np.arange(len(owners)) - np.repeat(counts.cumsum() - counts, counts)) * self.step
        num_keys = pasts[owners] + np.minimum(firsts + self.step, query_lens[owners])
        order = np.argsort(-num_keys, kind="stable")
        found = np.zeros((1 + len(order), 2), np.int32)
        found[0, 0] = len(order)
        found[1:] = np.stack((owners + single, firsts), axis=1)[order]
        return found


class TileLists:
    """The lists of the steps in flight, int32 [1 + tiles, 2] each, on the device.

    They go up from pinned memory, which is written again when the step with the same slot has been
    collected. Captured steps read theirs at one place.
    """

    def __init__(self, cut: TileCut, limits: BatchLimits, device: torch.device) -> None:
        self.cut = cut
        shape = cut.entries(limits)
        self.memory = torch.zeros(shape, dtype=torch.int32, device=device)
        self._staged = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")

    def upload(self, tiles: np.ndarray, batch: Batch) -> Tensor:
        """Enqueue the upload of a list; return where it will be."""
        slot = batch.in_flight_slot
        is_captured = batch.captured_for is not GraphSupport.NONE
        staged, found = self._staged[slot, : len(tiles)], self.memory[-1 if is_captured else slot]
        staged.copy_(torch.from_numpy(tiles))
        found[: len(tiles)].copy_(staged, non_blocking=True)
        return found
