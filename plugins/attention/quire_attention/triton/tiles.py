"""Tiles of sequences with several tokens: cut on the host, once a step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.interfaces.attention import AttentionSpec, BatchLimits, GraphSupport
from quire.interfaces.batch import Batch
from quire_attention.triton.tuning import Tile, Tuning


class TileLists:
    """The tiles of the steps in flight, on the device: int32 [1 + num_tiles, 2] each.

    First their number, then the (sequence, first token) of each, those with the most keys first.
    A step's tiles go up from pinned memory, which is written again when the step with the same slot
    has been collected. Captured steps read theirs at one place, behind those of the slots.
    """

    def __init__(self, spec: AttentionSpec, tuning: Tuning, limits: BatchLimits) -> None:
        self._group_size = spec.num_heads // spec.num_kv_heads
        self._tuning = tuning
        self._latent = spec.latent
        device = torch.device(spec.device)
        num_slots, length = limits.max_steps_in_flight + 1, _max_length(spec, tuning, limits)
        self._lists = torch.zeros((num_slots + 1, length, 2), dtype=torch.int32, device=device)
        self._staged = torch.zeros(
            (num_slots, length, 2), dtype=torch.int32, pin_memory=device.type == "cuda"
        )

    @staticmethod
    def num_entries(spec: AttentionSpec, tuning: Tuning, limits: BatchLimits) -> int:
        """Return how many integers the lists have on the device."""
        return (limits.max_steps_in_flight + 2) * _max_length(spec, tuning, limits) * 2

    def tile_for(self, query_len: int) -> Tile:
        """Return the tile that serves sequences of so many tokens in the step at the most."""
        fits = query_len * self._group_size <= self._tuning.few.block_m
        return self._tuning.few if fits else self._tuning.many

    def most(self, num_tokens: int, num_seqs: int, tile: Tile) -> int:
        """Return the most tiles of so many tokens of sequences with two or more each."""
        step = tile.block_m // self._group_size
        return -(-num_tokens // step) + min(num_seqs, num_tokens // 2)

    def cut(self, batch: Batch, tile: Tile) -> np.ndarray:
        """Return the list of a step, without sequences of latents that their layer serves."""
        step = tile.block_m // self._group_size
        single = batch.num_single_token_seqs
        query_lens = np.array(batch.query_lens[single:], np.int64)
        seq_lens = np.array(batch.seq_lens_bound[single : len(batch.query_lens)], np.int64)
        counts = -(-query_lens // step)
        if self._latent is not None:
            counts[np.array(self._latent.plain_rows(batch), np.int64) - single] = 0
        sequences = np.repeat(np.arange(len(counts)), counts)
        firsts = (np.arange(len(sequences)) - np.repeat(counts.cumsum() - counts, counts)) * step
        num_keys = (seq_lens - query_lens)[sequences] + firsts
        order = np.argsort(-num_keys, kind="stable")
        found = np.zeros((1 + len(order), 2), np.int32)
        found[0, 0] = len(order)
        found[1:, 0], found[1:, 1] = sequences[order] + single, firsts[order]
        return found

    def uploaded(self, tiles: np.ndarray, batch: Batch) -> Tensor:
        """Enqueue the upload of a list; return where it will be."""
        slot = batch.in_flight_slot
        is_captured = batch.captured_for is not GraphSupport.NONE
        staged, found = self._staged[slot, : len(tiles)], self._lists[-1 if is_captured else slot]
        staged.copy_(torch.from_numpy(tiles))
        found[: len(tiles)].copy_(staged, non_blocking=True)
        return found


def _max_length(spec: AttentionSpec, tuning: Tuning, limits: BatchLimits) -> int:
    """Return the longest list: a tile has tokens of one sequence."""
    step = tuning.many.block_m // (spec.num_heads // spec.num_kv_heads)
    return 1 + -(-limits.max_num_batched_tokens // step) + limits.max_num_seqs
