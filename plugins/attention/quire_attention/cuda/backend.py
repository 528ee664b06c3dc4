"""Attention by the kernels in csrc/quire_kernels/attention/cuda: what they are launched with."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from attrs import frozen
from torch import Tensor

from quire.errors import KernelError
from quire.interfaces.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchLimits,
    GraphSupport,
    KVLayout,
)
from quire.interfaces.batch import Batch
from quire_attention.cuda import library
from quire_attention.cuda.library import Arguments
from quire_attention.cuda.tiles import TileCut, TileLists
from quire_attention.cuda.wide import WideBlocks, WidePlan
from quire_kernels import head_token_kv

DTYPES = ("bfloat16", "float16")
# What a cache may hold beside the model's dtype, in the order of arguments.h.
QUANTIZED = ("float8_e4m3fn", "float8_e5m2")
# Keys come in units of so many tokens, each within one block.
UNIT = 16
# Rows of a tile of the sequences with several tokens, on the GPUs with the smallest.
LEAST_TILE_ROWS, LARGEST_TILE_ROWS = 64, 128
# Heads of a block of the decode kernel.
HEADS_TOGETHER = 16
ITEM_SIZE = 4
# For the memory budget, which is made before the device is asked: no GPU today has more.
MAX_SMS = 192
# Sequences with one token are cut into items of at least FEW_CHUNK keys until there is one an SM.
# One H200, 32/8 heads of 128: a sequence of 32,768 takes 37.1 us so, 38.5 us with two an SM.
FEW_CHUNK = 128
CHUNK = 512


@frozen(kw_only=True)
class CudaPlan:
    """What the layers of a step share.

    Of the first `num_single` rows those that have one token are served as such. `tiles` int32
    [1 + num_tiles or more, 2] are the (sequence, first token) of the others behind their number;
    `most_tiles` is what the launch is made for. `wide`, where it is there, serves them instead.
    """

    block_table: Tensor
    slots: Tensor
    seq_lens: Tensor
    starts: Tensor
    num_single: int
    tiles: Tensor | None
    most_tiles: int
    wide: WidePlan | None = None


class CudaAttention(AttentionBackend):
    """Serve causal attention with windows, soft caps and sinks, in bfloat16 and float16."""

    graph_support = GraphSupport.ANY
    quantized_kv = QUANTIZED
    # Whether to use the kernels that only Hopper GPUs have, where there is one.
    with_hopper: ClassVar[bool] = True
    # Whether blocks of a quantized cache are made wide for prompts, where that is faster.
    with_wide_blocks: ClassVar[bool] = True

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Refuse what the kernels cannot express; they are not built for this."""
        group = spec.num_heads // spec.num_kv_heads
        is_served_dim = spec.head_dim in library.HEAD_DIMS
        reasons = {
            "latent attention": spec.latent is not None,
            "ALiBi": spec.alibi,
            "bidirectional attention": not spec.causal,
            "batch invariance": spec.batch_invariant,
            f"{spec.dtype}, only {' and '.join(DTYPES)}": spec.dtype not in DTYPES,
            "KV cache in another dtype than the model's": not spec.has_quantized_kv
            and spec.kv_dtype != spec.dtype,
            f"quantized KV cache for heads of {spec.head_dim}, only of "
            f"{library.QUANTIZED_HEAD_DIMS}": spec.has_quantized_kv
            and spec.head_dim not in library.QUANTIZED_HEAD_DIMS,
            f"heads of {spec.head_dim}, only of {library.HEAD_DIMS}": not is_served_dim,
            "values of another width than keys": spec.value_head_dim != spec.head_dim,
            f"{group} query heads a KV head, at most {LEAST_TILE_ROWS}": group > LEAST_TILE_ROWS,
            "scale of zero or less": spec.scale <= 0,
            f"block size of {spec.block_size}, only multiples of {UNIT}": spec.block_size % UNIT
            != 0,
        }
        missing = [name for name, needed in reasons.items() if needed]
        if missing:
            return f"it has no {', no '.join(missing)}"
        if torch.device(spec.device).type != "cuda":
            return f"it runs on an NVIDIA GPU, not on {spec.device!r}"
        return None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Return [num_kv_heads, block_size, head_dim + value_head_dim]: key, then value.

        The layout of `triton`: one head's keys and values of a block are one contiguous piece.
        """
        width = spec.head_dim + spec.value_head_dim
        shape = (spec.num_kv_heads, spec.block_size, width)
        return KVLayout(name=head_token_kv.NAME, block_shape=shape, dtype=spec.kv_dtype)

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec, limits: BatchLimits) -> int:
        """Count the split plan, the partial results and the tile lists."""
        num_rows = limits.max_num_seqs
        items = num_rows + _extra_items(num_rows, MAX_SMS, spec)
        plan = items * ITEM_SIZE + num_rows + 1 + num_rows * spec.num_heads
        partial = items * spec.num_heads * (spec.value_head_dim + 1)
        tiles = math.prod(TileCut.of(spec, LEAST_TILE_ROWS).entries(limits))
        wide = 0
        if spec.has_quantized_kv and library.capability_here() == library.HOPPER:
            wide = WideBlocks.num_bytes(spec, limits, LARGEST_TILE_ROWS)
        return 4 * (plan + partial + tiles) + wide

    def __init__(
        self, spec: AttentionSpec, limits: BatchLimits, options: Mapping[str, Any]
    ) -> None:
        super().__init__(spec, limits, options)
        device = torch.device(spec.device)
        self._device = device
        self.group_size = spec.num_heads // spec.num_kv_heads
        capability = torch.cuda.get_device_capability(device)
        self._library = library.load(capability, with_hopper=self.with_hopper)
        self._kv_dtype = 1 + QUANTIZED.index(spec.kv_dtype) if spec.has_quantized_kv else 0
        self.tile_rows = self._library.quire_attention_tile_rows(spec.head_dim, self._kv_dtype)
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._num_programs = min(num_sms, MAX_SMS)
        max_items = self.max_items(limits.max_num_seqs)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._items = ints(max_items, ITEM_SIZE)
        self._first_items = ints(limits.max_num_seqs + 1)
        self._arrived = ints(limits.max_num_seqs, spec.num_heads)
        shape = (max_items, spec.num_heads)
        self._partial = torch.empty(*shape, spec.value_head_dim, device=device)
        self._partial_lse = torch.empty(shape, device=device)
        self._tiles = TileLists(TileCut.of(spec, self.tile_rows), limits, device)
        self._wide: WideBlocks | None = None
        # Kernels that read wide blocks are worth it where they are others.
        rows = self._library.quire_attention_tile_rows(spec.head_dim, 0)
        if self.with_wide_blocks and rows != self.tile_rows:
            self._wide = WideBlocks(spec, limits, rows)
        self._arguments = self._constant_arguments(num_sms)

    def _constant_arguments(self, num_sms: int) -> Arguments:
        """Return the struct with what no call changes."""
        spec = self.spec
        return Arguments(
            items=self._items.data_ptr(),
            first_items=self._first_items.data_ptr(),
            arrived=self._arrived.data_ptr(),
            partial=self._partial.data_ptr(),
            partial_lse=self._partial_lse.data_ptr(),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=spec.block_size,
            window=spec.sliding_window or 0,
            dtype=DTYPES.index(spec.dtype),
            kv_dtype=self._kv_dtype,
            few_chunk=FEW_CHUNK,
            chunk=CHUNK,
            num_sms=num_sms,
            scale=spec.scale,
            softcap=spec.logit_softcap or 0.0,
        )

    def max_items(self, num_rows: int) -> int:
        """Return the most items into which so many sequences with one token are cut."""
        return num_rows + _extra_items(num_rows, self._num_programs, self.spec)

    def plan(self, batch: Batch, group: int) -> CudaPlan:
        """Cut the sequences with several tokens into tiles.

        In a CUDA graph launches and tensors are the same for all batches of a size: blocks find on
        the device whether there is something for them to do.
        """
        tables, lists = batch.groups[group], self._tiles
        single = batch.num_single_token_seqs
        tiles, most_tiles, wide = None, 0, None
        if batch.captured_for is GraphSupport.ANY:
            num_tokens, num_seqs = batch.token_ids.shape[0], batch.seq_lens.shape[0]
            single = min(num_seqs, num_tokens)
            tiles = lists.upload(lists.cut.list_of(batch), batch)
            most_tiles = lists.cut.most(num_tokens, min(num_seqs, num_tokens // 2))
        elif single == len(batch.query_lens):
            single = batch.seq_lens.shape[0]
        else:
            wide = None if self._wide is None else self._wide.plan(batch)
            if wide is None:
                cut = lists.cut.list_of(batch)
                tiles, most_tiles = lists.upload(cut, batch), len(cut) - 1
        return CudaPlan(
            block_table=tables.block_table,
            slots=tables.slot_mapping,
            seq_lens=batch.seq_lens,
            starts=batch.cu_seqlens_q,
            num_single=single,
            tiles=tiles,
            most_tiles=most_tiles,
            wide=wide,
        )

    def prepare(self, plan: CudaPlan) -> None:
        """Cut the sequences with one token into splits, on the device."""
        if plan.num_single:
            self._take(plan)
            self._call(self._library.quire_attention_plan)

    def _take(self, plan: CudaPlan) -> Arguments:
        """Return the struct with what a plan says."""
        arguments, num_rows = self._arguments, plan.num_single
        arguments.seq_lens = plan.seq_lens.data_ptr()
        arguments.starts = plan.starts.data_ptr()
        arguments.block_table = plan.block_table.data_ptr()
        arguments.table_stride = plan.block_table.stride(0)
        arguments.num_rows = num_rows
        extra = _extra_items(num_rows, self._num_programs, self.spec)
        arguments.few_extra = arguments.num_extra = extra
        arguments.max_items = num_rows + extra
        if plan.tiles is not None:
            arguments.tiles = plan.tiles.data_ptr()
            arguments.most_tiles = plan.most_tiles
        return arguments

    def _call(self, entry: Any) -> None:
        """Launch on the current stream. Raises: KernelError with the runtime's words."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        error = entry(ctypes.byref(self._arguments), stream)
        if error:
            text = self._library.quire_attention_error(error).decode()
            raise KernelError(
                f"attention backend 'cuda': a launch failed: {text}. "
                f"Choose another with --attention-backend, and report this."
            )

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: CudaPlan
    ) -> None:
        """Store each token's key and value in its slot."""
        head_token_kv.write(layer, k, v, kv_cache, plan.slots)

    def rotate_and_write(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        positions: Tensor,
        rotary: Any,
        qk_norm: Any,
        kv_cache: Tensor,
        plan: CudaPlan,
    ) -> Tensor | None:
        """Normalise, rotate and write in one kernel."""
        return head_token_kv.rotate_and_write(
            layer, qkv, positions, rotary, qk_norm, kv_cache, plan.slots
        )

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: CudaPlan,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Attend sequences with one token, and the others' tiles."""
        if kv_cache is None:
            raise KernelError(
                "attention backend 'cuda' needs a KV cache, and the model runs without one; "
                "choose another with --attention-backend."
            )
        arguments = self._take(plan)
        arguments.q, arguments.cache, arguments.out = (
            q.data_ptr(),
            kv_cache.data_ptr(),
            out.data_ptr(),
        )
        arguments.lse = None if lse is None else lse.data_ptr()
        arguments.sinks = None if layer.sinks is None else layer.sinks.data_ptr()
        if layer.k_scale is not None and layer.v_scale is not None:
            arguments.k_scale = layer.k_scale.data_ptr()
            arguments.v_scale = layer.v_scale.data_ptr()
        arguments.q_stride_token, arguments.q_stride_head = q.stride(0), q.stride(1)
        arguments.out_stride, arguments.block_stride = out.stride(0), kv_cache.stride(0)
        arguments.num_tokens, arguments.num_blocks = q.shape[0], kv_cache.shape[0]
        if plan.num_single:
            self._call(self._library.quire_attention_decode)
        if plan.tiles is not None:
            self._call(self._library.quire_attention_prefill)
        if plan.wide is not None:
            self._attend_wide(plan, plan.wide)

    def _attend_wide(self, plan: CudaPlan, wide: WidePlan) -> None:
        """Make the blocks that prompts see wide, and attend to those; arguments are set."""
        assert self._wide is not None, "it planned"
        arguments, memory, table = self._arguments, self._wide.memory, self._wide.table
        arguments.wide, arguments.wide_table = memory.data_ptr(), table.data_ptr()
        arguments.wide_stride = table.stride(0)
        arguments.wide_blocks, arguments.most_wide = wide.blocks.data_ptr(), wide.num_blocks
        self._call(self._library.quire_attention_widen)
        arguments.cache, arguments.block_stride = memory.data_ptr(), memory.stride(0)
        arguments.block_table, arguments.table_stride = table.data_ptr(), table.stride(0)
        arguments.num_blocks, arguments.kv_dtype = len(memory), 0
        arguments.tiles, arguments.most_tiles = wide.tiles.data_ptr(), wide.num_tiles
        self._call(self._library.quire_attention_prefill)
        arguments.kv_dtype = self._kv_dtype


def _extra_items(num_rows: int, num_programs: int, spec: AttentionSpec) -> int:
    """Return how many items more than rows there may be, for so many programs of all KV heads.

    A quarter of the rows at least, so that the longest of many sequences are cut.
    """
    group = spec.num_heads // spec.num_kv_heads
    programs_an_item = spec.num_kv_heads * -(-group // HEADS_TOGETHER)
    return max(-(-num_programs // programs_an_item) - num_rows, num_rows // 4, 1)
