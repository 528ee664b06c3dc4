"""Attention by the C++ kernels of `quire_kernels.cpu`: what they are called with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from quire.errors import ConfigError
from quire.interfaces.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchLimits,
    KVLayout,
)
from quire.interfaces.batch import Batch
from quire_kernels.cpu import ISAS, calls

MAX_HEAD_DIM = 1024


@frozen(kw_only=True)
class CpuPlan:
    """A step cut into items, with the tensors that `step` points to."""

    slots: Tensor
    query_lens: list[int]
    seq_lens: list[int]
    step: calls.Step
    kept: tuple[Tensor, ...]


class CpuAttention(AttentionBackend):
    """Serve every spec but latent attention, in the model's dtype.

    Sums over keys are cut at fixed places and merged in order: a sequence's bits depend neither
    on the batch nor on the number of threads.
    """

    batch_invariant = True

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Refuse what the kernels cannot express."""
        reasons = {
            "latent attention": spec.latent is not None,
            spec.dtype: spec.dtype not in calls.DTYPES,
            "a KV cache in another dtype than the model's": spec.kv_dtype != spec.dtype,
            f"heads beyond {MAX_HEAD_DIM} dimensions": max(spec.head_dim, spec.value_head_dim)
            > MAX_HEAD_DIM,
            f"memory of a {spec.device} device": spec.device != "cpu",
        }
        missing = [name for name, needed in reasons.items() if needed]
        return f"it has no {', no '.join(missing)}" if missing else None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Return [num_kv_heads, keys of a head, then its values], flat; interface.h draws it."""
        pair = _pair(spec)
        keys = -(-spec.head_dim // pair) * pair
        shape = (spec.num_kv_heads, spec.block_size * (keys + spec.value_head_dim))
        return KVLayout(name="head-pairs-kv", block_shape=shape, dtype=spec.kv_dtype)

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec, limits: BatchLimits) -> int:
        """Count a scratch for each thread and the sums of splits, as if vectors were the widest."""
        num_threads = torch.get_num_threads()
        rows = max(spec.num_heads // spec.num_kv_heads, calls.TILE_ROWS)
        value = -(-spec.value_head_dim // 32) * 32
        scratch = rows * (spec.head_dim + 64 + 2 * value + 8) + 64 * (spec.head_dim + 32)
        # Steps are cut where there are fewer than four items a thread.
        splits = -(-limits.max_model_len // calls.SPLIT)
        parts = min(4 * num_threads + spec.num_kv_heads, limits.max_num_seqs * spec.num_kv_heads)
        return 4 * (num_threads * scratch + parts * splits * rows * (value + 2))

    def __init__(
        self, spec: AttentionSpec, limits: BatchLimits, options: Mapping[str, Any]
    ) -> None:
        super().__init__(spec, limits, options)
        self._library = calls.library()
        self._spec = calls.Spec(
            dtype=calls.DTYPES[spec.dtype],
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            value_dim=spec.value_head_dim,
            block_size=spec.block_size,
            causal=spec.causal,
            window=spec.sliding_window or 0,
            scale=spec.scale,
            softcap=spec.logit_softcap or 0,
            isa=_isa(options.get("isa", "auto")),
        )
        self._scratch_size = self._library.quire_scratch_size(self._spec)
        self._part_size = self._library.quire_part_size(self._spec)
        self._scratch = self._parts = torch.empty(0)
        self._finished = torch.zeros(0, dtype=torch.int32)
        self._attend, self._write = calls.AttendCall(), calls.WriteCall()
        self._found = (ctypes.c_int64 * 3)()

    def plan(self, batch: Batch, group: int) -> CpuPlan:
        """Cut the step into items: some queries of a sequence, a KV head, some of its keys."""
        tables = batch.groups[group]
        return self._planned(
            tables.block_table,
            tables.slot_mapping,
            (batch.seq_lens, batch.cu_seqlens_q),
            (batch.query_lens, batch.seq_lens_bound),
        )

    def _planned(
        self,
        block_table: Tensor,
        slots: Tensor,
        on_device: tuple[Tensor, Tensor],
        on_host: tuple[list[int], list[int]],
    ) -> CpuPlan:
        query_lens, seq_lens = on_host
        lengths, starts = (tensor.contiguous() for tensor in on_device)
        items, num_parts, (num_items, parts, num_threads) = self._cut(lengths, starts, on_host)
        self._make_room(parts, num_threads)
        step = calls.Step(
            block_table=block_table.data_ptr(),
            seq_lens=lengths.data_ptr(),
            starts=starts.data_ptr(),
            table_stride=block_table.stride(0),
            num_items=num_items,
            num_threads=num_threads,
            scratch_size=self._scratch_size,
            part_size=self._part_size,
            items=items.data_ptr(),
            num_parts=num_parts.data_ptr(),
            finished=self._finished.data_ptr(),
            scratch=self._scratch.data_ptr(),
            parts=self._parts.data_ptr(),
        )
        return CpuPlan(
            slots=slots,
            query_lens=query_lens,
            seq_lens=seq_lens,
            step=step,
            # The room too: a later plan may take a larger one.
            kept=(
                *(block_table, lengths, starts, items, num_parts),
                *(self._finished, self._scratch, self._parts),
            ),
        )

    def _cut(
        self, lengths: Tensor, starts: Tensor, on_host: tuple[list[int], list[int]]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Return items, the parts of each cut sequence, and how many items, parts, threads."""
        query_lens, seq_lens = on_host
        self._spec.num_threads = torch.get_num_threads()
        tile = max(1, calls.TILE_ROWS * self.spec.num_kv_heads // self.spec.num_heads)
        num_tiles = sum(query_lens) // tile + len(query_lens)
        capacity = max(1, self.spec.num_kv_heads * num_tiles)
        if capacity < 8 * self._spec.num_threads:
            # Few enough for each to be cut into its splits.
            capacity *= max(seq_lens, default=0) // calls.SPLIT + 2
        items = torch.empty(capacity, calls.ITEM_SIZE, dtype=torch.int32)
        num_parts = torch.empty(capacity, dtype=torch.int32)
        is_cut = self._library.quire_cut(
            self._spec,
            lengths.data_ptr(),
            starts.data_ptr(),
            len(query_lens),
            items.data_ptr(),
            num_parts.data_ptr(),
            capacity,
            self._found,
        )
        assert is_cut, (capacity, query_lens, seq_lens)
        return items, num_parts, list(self._found)

    def _make_room(self, num_parts: int, num_threads: int) -> None:
        """Let the rooms that all plans share be large enough: layers run one after another."""
        if self._scratch.numel() < num_threads * self._scratch_size:
            self._scratch = torch.empty(num_threads * self._scratch_size)
        if self._finished.numel() < num_parts:
            self._parts = torch.empty(num_parts * self._part_size)
            self._finished = torch.zeros(num_parts, dtype=torch.int32)

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: CpuPlan
    ) -> None:
        """Store each token's key and value in its slot."""
        call = self._write
        call.q = None
        self._store(call, k, v, kv_cache, plan.slots)

    def _store(
        self, call: calls.WriteCall, k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        call.k, call.v, call.cache = k.data_ptr(), v.data_ptr(), kv_cache.data_ptr()
        call.slots, call.num_tokens = slots.data_ptr(), k.shape[0]
        call.k_token, call.k_head, _ = k.stride()
        call.v_token, call.v_head, _ = v.stride()
        call.block_bytes = kv_cache.stride(0) * kv_cache.element_size()
        if call.q is None:
            call.rotary_half = 0
        self._library.quire_write(self._spec, call)

    def rotate_and_write(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        positions: Tensor,
        rotary: Any,
        qk_norm: Any,
        kv_cache: Tensor,
        plan: CpuPlan,
    ) -> Tensor | None:
        """Normalise, rotate and write in one pass, rounding once."""
        spec, call = self.spec, self._write
        if spec.value_head_dim != spec.head_dim:
            return None
        heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
        split = spec.num_heads + spec.num_kv_heads
        q = qkv.new_empty(qkv.shape[0], spec.num_heads, spec.head_dim)
        call.q, call.q_out, call.q_token = heads.data_ptr(), q.data_ptr(), heads.stride(0)
        call.positions = positions.data_ptr()
        call.rotary_half = 0
        if rotary is not None:
            call.cos, call.sin = rotary.cos.data_ptr(), rotary.sin.data_ptr()
            call.rotary_half = rotary.rotary_dim // 2
        call.q_norm = call.k_norm = None
        if qk_norm is not None:
            call.q_norm, call.k_norm = qk_norm.q.data_ptr(), qk_norm.k.data_ptr()
            call.eps = qk_norm.eps
        self._store(call, heads[:, spec.num_heads : split], heads[:, split:], kv_cache, plan.slots)
        return q

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: CpuPlan,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Work off the plan's items; without a cache, one is made of `k` and `v`."""
        if kv_cache is None:
            plan, kv_cache = self._without_cache(layer, k, v, plan)
        q = q if q.stride(-1) == 1 else q.contiguous()
        call = self._attend
        call.q, call.cache, call.out = q.data_ptr(), kv_cache.data_ptr(), out.data_ptr()
        call.lse = None if lse is None else lse.data_ptr()
        call.sinks = None if layer.sinks is None else layer.sinks.data_ptr()
        slopes = layer.alibi_slopes
        call.alibi_slopes = None if slopes is None else slopes.data_ptr()
        call.q_token, call.q_head, _ = q.stride()
        call.block_bytes = kv_cache.stride(0) * kv_cache.element_size()
        self._library.quire_attend(self._spec, plan.step, call)

    def _without_cache(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, plan: CpuPlan
    ) -> tuple[CpuPlan, Tensor]:
        """Return blocks that hold a step's own keys and values, and a plan to read them."""
        size, lengths = self.spec.block_size, plan.query_lens
        counts = [-(-length // size) for length in lengths]
        table = torch.zeros(len(lengths), max(counts, default=1), dtype=torch.int32)
        slots, first = [], 0
        for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            table[row, :count] = torch.arange(first, first + count, dtype=torch.int32)
            slots.append(torch.arange(length, dtype=torch.int32) + first * size)
            first += count
        layout = self.kv_layout(self.spec)
        blocks = torch.empty(first, *layout.block_shape, dtype=k.dtype)
        starts = plan.kept[2]
        own = self._planned(table, torch.cat(slots), (starts.diff(), starts), (lengths, lengths))
        self.write(layer, k, v, blocks, own)
        return own, blocks


def _pair(spec: AttentionSpec) -> int:
    """Return how many elements a word of 32 bits has."""
    return 1 if spec.dtype == "float32" else 2


def _isa(wanted: str) -> int:
    """Return the number of an instruction set. Raises: ConfigError where it is not there."""
    if wanted == "auto":
        return calls.best_isa()
    number = ISAS.index(wanted)
    if not calls.has_isa(number):
        there = [name for n, name in enumerate(ISAS) if calls.has_isa(n)]
        raise ConfigError(
            f"--attention-option cpu.isa={wanted}: this processor has no {wanted}; "
            f"it has {', '.join(there)}."
        )
    return number
