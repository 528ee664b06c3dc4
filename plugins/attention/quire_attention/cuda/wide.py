"""Blocks of a quantized cache that are made wide for the prompts of a step."""

from __future__ import annotations

import math

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from quire.interfaces.attention import AttentionSpec, BatchLimits, GraphSupport
from quire.interfaces.batch import Batch
from quire_attention.cuda.tiles import TileCut, TileLists

# Tokens that are made wide at once, at the most: 256 MiB for 8 KV heads of 128 in 16 bits. Steps
# whose prompts see more are served by the kernels that widen numbers as they multiply them.
MOST_TOKENS = 1 << 16


@frozen(kw_only=True)
class WidePlan:
    """`blocks` int32 [1 + num_blocks, 2]: their number, then (sequence, number in it) of each.

    `tiles` are cut for the kernels that read wide blocks.
    """

    blocks: Tensor
    num_blocks: int
    tiles: Tensor
    num_tiles: int


class WideBlocks:
    """Memory for wide blocks, shared by the layers of a group: each fills it before it reads it."""

    def __init__(self, spec: AttentionSpec, limits: BatchLimits, tile_rows: int) -> None:
        device = torch.device(spec.device)
        self._spec = spec
        shape, table, lists = _shapes(spec, limits)
        self.memory = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
        self.table = torch.zeros(table, dtype=torch.int32, device=device)
        self._lists = torch.zeros(lists, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._staged = torch.zeros(lists, dtype=torch.int32, pin_memory=pinned)
        self._tiles = TileLists(TileCut.of(spec, tile_rows), limits, device)

    @staticmethod
    def num_bytes(spec: AttentionSpec, limits: BatchLimits, tile_rows: int) -> int:
        """Return the bytes of device memory that an instance holds."""
        shape, table, lists = _shapes(spec, limits)
        tiles = TileCut.of(spec, tile_rows).entries(limits)
        return 2 * math.prod(shape) + 4 * sum(map(math.prod, (table, lists, tiles)))

    def plan(self, batch: Batch) -> WidePlan | None:
        """Return the blocks that the step's prompts see; None where there is no room for them.

        Nor where the step is captured: other steps will have other blocks.
        """
        if batch.captured_for is not GraphSupport.NONE:
            return None
        found = self._list_of(batch)
        if len(found) - 1 > len(self.memory):
            return None
        slot = batch.in_flight_slot
        staged, blocks = self._staged[slot, : len(found)], self._lists[slot]
        staged.copy_(torch.from_numpy(found))
        blocks[: len(found)].copy_(staged, non_blocking=True)
        tiles = self._tiles.cut.list_of(batch)
        return WidePlan(
            blocks=blocks,
            num_blocks=len(found) - 1,
            tiles=self._tiles.upload(tiles, batch),
            num_tiles=len(tiles) - 1,
        )

    def _list_of(self, batch: Batch) -> np.ndarray:
        spec, single = self._spec, batch.num_single_token_seqs
        query_lens = np.array(batch.query_lens[single:], np.int64)
        seq_lens = np.array(batch.seq_lens_bound[single : len(batch.query_lens)], np.int64)
        first = np.zeros_like(seq_lens)
        if spec.sliding_window is not None:
            first = np.maximum(seq_lens - query_lens - spec.sliding_window + 1, 0)
        first //= spec.block_size
        counts = -(-seq_lens // spec.block_size) - first
        owners = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(owners)) - np.repeat(counts.cumsum() - counts, counts)
        found = np.zeros((1 + len(owners), 2), np.int32)
        found[0, 0] = len(owners)
        found[1:] = np.stack((owners + single, within + first[owners]), axis=1)
        return found


def _shapes(
    spec: AttentionSpec, limits: BatchLimits
) -> tuple[tuple[int, ...], tuple[int, int], tuple[int, int, int]]:
    """Return the shapes of the wide blocks, of the table of where they are, and of the lists."""
    num_tokens = min(MOST_TOKENS, limits.max_model_len + limits.max_num_batched_tokens)
    num_blocks = -(-num_tokens // spec.block_size) + min(limits.max_num_seqs, 256)
    width = -(-limits.max_model_len // spec.block_size) + 1
    block = (spec.num_kv_heads, spec.block_size, 2 * spec.head_dim)
    slots = limits.max_steps_in_flight + 2
    return (num_blocks, *block), (limits.max_num_seqs, width), (slots, 1 + num_blocks, 2)
