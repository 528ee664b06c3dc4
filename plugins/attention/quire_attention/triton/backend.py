"""Attention by the kernels beside this file: what they are launched with, and on which rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from triton import knobs

from quire.errors import KernelError
from quire.interfaces.attention import (
    QUANTIZED_KV_DTYPES,
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchLimits,
    GraphSupport,
    KVLayout,
    latent_layout,
)
from quire.interfaces.batch import Batch
from quire_attention.triton import kernels, latent
from quire_attention.triton.launch import (
    fitted_tuning,
    in_groups,
    kernel_of,
    latent_rank,
    merged_width,
    tuning_of,
    widest_head,
)
from quire_attention.triton.tiles import TileLists
from quire_attention.triton.tuning import Tile, Tuning, power_of_two
from quire_kernels import head_token_kv, overlap

DTYPES = ("float32", "bfloat16", "float16")
MAX_HEAD_DIM = 256
MAX_LATENT = 512
# Splits whose sums `merge` reads at a time.
MERGED_AT_ONCE = 16
# Up to so many sequences all items run at once, and their order does not matter.
UNSORTED_ROWS = 8
# For the memory budget, which is made before the device is asked: no GPU today has more.
MAX_SMS = 192


@frozen(kw_only=True)
class TritonPlan:
    """What the layers of a step share.

    Of the first `num_single` rows those that have one token are served as such. `tiles` int32
    [1 + num_tiles or more, 2] are the (sequence, first token) of the others, heaviest first, cut
    for `tile`, behind their number; the grid has `most_tiles`.
    """

    block_table: Tensor
    slots: Tensor
    seq_lens: Tensor
    starts: Tensor
    num_single: int
    tiles: Tensor | None
    most_tiles: int
    tile: Tile


class TritonAttention(AttentionBackend):
    """Serve causal attention with windows, soft caps, sinks, ALiBi and latents, in its dtype.

    Numbers of a quantized cache are made float16, or float32 as the model's, before they are
    multiplied, which loses nothing; scales are applied to scores and sums.

    Where batch invariance is asked for all rows have the same tile, no sequence is split, and each
    tile is masked, so that a row's sums are those of its own keys in their order.
    """

    batch_invariant = True
    graph_support = GraphSupport.ANY
    quantized_kv = QUANTIZED_KV_DTYPES

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Refuse what the kernels cannot express, and a CPU without Triton's interpreter."""
        reasons = {
            "ALiBi with latents": spec.alibi and spec.latent is not None,
            "bidirectional attention": not spec.causal,
            f"{spec.dtype}": spec.dtype not in DTYPES,
            "KV cache in another dtype than the model's": not spec.has_quantized_kv
            and spec.kv_dtype != spec.dtype,
            f"heads beyond {MAX_HEAD_DIM} dimensions": widest_head(spec) > MAX_HEAD_DIM,
            f"latents beyond {MAX_LATENT} dimensions": latent_rank(spec) > MAX_LATENT,
            "scale of zero or less": spec.scale <= 0,
            f"block size of {spec.block_size}": spec.block_size & (spec.block_size - 1) != 0,
        }
        missing = [name for name, needed in reasons.items() if needed]
        if missing:
            return f"it has no {', no '.join(missing)}"
        if spec.kv_dtype == "float8_e4m3fn" and not _converts_e4m3(spec.device):
            return "it has no float8_e4m3fn KV cache before compute capability 8.9; take fp8_e5m2"
        if spec.device == "cpu" and not knobs.runtime.interpret:
            return (
                "on a CPU it runs in Triton's interpreter only, which TRITON_INTERPRET=1 asks for"
            )
        return None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Return [num_kv_heads, block_size, head_dim + value_head_dim]: key, then value.

        What a program reads of a block, one head's keys and values, is one contiguous piece.
        """
        if spec.latent is not None:
            return latent_layout(spec)
        width = spec.head_dim + spec.value_head_dim
        shape = (spec.num_kv_heads, spec.block_size, width)
        return KVLayout(name=head_token_kv.NAME, block_shape=shape, dtype=spec.kv_dtype)

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec, limits: BatchLimits) -> int:
        """Count the split plan, the partial results and the tile lists."""
        tuning, spec = tuning_of(spec), in_groups(spec)
        items = limits.max_num_seqs + _extra_items(
            limits.max_num_seqs, tuning.most_per_sm * MAX_SMS, spec
        )
        plan = items * kernels.ITEM_SIZE.value + limits.max_num_seqs + 2
        partial = items * spec.num_heads * (spec.value_head_dim + 1)
        tiles = TileLists.num_entries(spec, tuning, limits)
        return 4 * (plan + partial + tiles)

    def __init__(
        self, spec: AttentionSpec, limits: BatchLimits, options: Mapping[str, Any]
    ) -> None:
        super().__init__(spec, limits, options)
        self._grouped = in_groups(spec)
        self.set_tuning(fitted_tuning(spec))

    def set_tuning(self, tuning: Tuning) -> None:
        """Take tiles and split limits, and make the buffers that they need."""
        spec, limits = self._grouped, self.limits
        device = torch.device(spec.device)
        self.tuning = tuning
        num_sms = _num_sms(device)
        self._few_programs = tuning.few_per_sm * num_sms
        self._most_programs = tuning.most_per_sm * num_sms
        self._crowd = tuning.crowd_per_sm * num_sms
        max_items = self.max_items(limits.max_num_seqs)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._items = ints(max_items, kernels.ITEM_SIZE.value)
        self._first_items, self._num_items = ints(limits.max_num_seqs + 1), ints(1)
        shape = (max_items, spec.num_heads)
        self._partial = torch.empty(*shape, spec.value_head_dim, device=device)
        self._partial_lse = torch.empty(shape, device=device)
        self._tiles = TileLists(spec, tuning, limits)

    def max_items(self, num_rows: int) -> int:
        """Return the most items into which so many sequences with one token are cut."""
        return num_rows + _extra_items(num_rows, self._most_programs, self._grouped)

    def plan(self, batch: Batch, group: int) -> TritonPlan:
        """Cut the sequences with several tokens into tiles.

        In a CUDA graph grids and tensors are the same for all batches of a size: programs find on
        the device whether there is something for them to do.
        """
        tables, tiles = batch.groups[group], self._tiles
        single = batch.num_single_token_seqs
        tile, cut, most_tiles = self.tuning.few, None, 0
        if batch.captured_for is GraphSupport.ANY:
            num_tokens, num_seqs = batch.token_ids.shape[0], batch.seq_lens.shape[0]
            single = min(num_seqs, num_tokens)
            tile = tiles.tile_for(num_tokens)
            most_tiles = tiles.most(num_tokens, num_seqs, tile)
            cut = tiles.cut(batch, tile)
        elif single == len(batch.query_lens):
            single = batch.seq_lens.shape[0]
        else:
            tile = tiles.tile_for(max(batch.query_lens[single:]))
            cut = tiles.cut(batch, tile)
            most_tiles = len(cut) - 1
        return TritonPlan(
            block_table=tables.block_table,
            slots=tables.slot_mapping,
            seq_lens=batch.seq_lens,
            starts=batch.cu_seqlens_q,
            num_single=single,
            tiles=tiles.uploaded(cut, batch) if cut is not None and most_tiles else None,
            most_tiles=most_tiles,
            tile=tile,
        )

    def prepare(self, plan: TritonPlan) -> None:
        """Cut the sequences with one token into splits, on the device."""
        if not plan.num_single:
            return
        few = plan.num_single <= UNSORTED_ROWS
        rows = UNSORTED_ROWS if few else power_of_two(self.limits.max_num_seqs)
        kernels.plan_splits[(1,)](
            plan.seq_lens,
            plan.starts,
            self._items,
            self._first_items,
            self._num_items,
            plan.num_single,
            _extra_items(plan.num_single, self._few_programs, self._grouped),
            _extra_items(plan.num_single, self._most_programs, self._grouped),
            FEW_CHUNK=self.tuning.few_chunk,
            CHUNK=self.tuning.chunk,
            BLOCK_N=self.tuning.single.block_n,
            WINDOW=self.spec.sliding_window,
            ROWS=rows,
            SORTED=rows > UNSORTED_ROWS,
            num_warps=4,
        )

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: TritonPlan
    ) -> None:
        """Store each token's key and value in its slot."""
        if self.spec.latent is not None:
            head_token_kv.write_latents(k, kv_cache, plan.slots, self.spec.value_head_dim)
            return
        head_token_kv.write(layer, k, v, kv_cache, plan.slots)

    def rotate_and_write(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        positions: Tensor,
        rotary: Any,
        qk_norm: Any,
        kv_cache: Tensor,
        plan: TritonPlan,
    ) -> Tensor | None:
        """Normalise, rotate and write in one kernel, where values are as wide as keys."""
        if self.spec.value_head_dim != self.spec.head_dim or self.spec.latent is not None:
            return None
        if self.spec.batch_invariant and qk_norm is not None:
            return None  # the kernel sums heads as the number of tokens tells it
        return head_token_kv.rotate_and_write(
            layer, qkv, positions, rotary, qk_norm, kv_cache, plan.slots
        )

    def rotate_and_write_latents(
        self,
        layer: AttentionLayer,
        projected: tuple[Tensor, Tensor],
        positions: Tensor,
        rotary: Any,
        norm: tuple[Tensor, float],
        kv_cache: Tensor,
        plan: TritonPlan,
    ) -> tuple[Tensor, Tensor] | None:
        """Do it in one kernel, where a sum's order does not matter."""
        if self.spec.batch_invariant:
            return None
        slots = plan.slots
        return latent.rotate_and_write(*projected, positions, rotary, norm, kv_cache, slots)

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: TritonPlan,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Attend sequences with one token, merge their splits, and attend the others' tiles."""
        if kv_cache is None:
            raise KernelError(
                "attention backend 'triton' needs a KV cache, and the model runs without one; "
                "choose another with --attention-backend."
            )
        if plan.num_single:
            grid = (self._grouped.num_kv_heads, self.max_items(plan.num_single))
            self._launch(grid, self._items, layer, q, kv_cache, plan, (out, lse))
            heads, width = self._heads_a_merge(plan.num_single), merged_width(self.spec)
            parts = -(-self.spec.value_head_dim // width)
            kernels.merge[(self.spec.num_heads // heads, plan.num_single, parts)](
                self._partial,
                self._partial_lse,
                self._first_items,
                out,
                lse,
                out.stride(0),
                NUM_HEADS=self.spec.num_heads,
                HEADS=heads,
                VALUE_DIM=self.spec.value_head_dim,
                BLOCK_V=width,
                BLOCK_S=MERGED_AT_ONCE,
                num_warps=2,
                **overlap.options(),
            )
        if plan.tiles is not None:
            grid = (self._grouped.num_kv_heads, plan.most_tiles)
            self._launch(grid, plan.tiles, layer, q, kv_cache, plan, (out, lse))

    def _heads_a_merge(self, num_rows: int) -> int:
        """Return how many heads a program merges: all where mostly there is nothing to merge."""
        return self.spec.num_heads if self._is_crowd(num_rows) else 1

    def _is_crowd(self, num_rows: int) -> bool:
        return num_rows * self._grouped.num_kv_heads >= self._crowd

    def _tile_of_singles(self, num_rows: int) -> Tile:
        return self.tuning.crowd if self._is_crowd(num_rows) else self.tuning.single

    def _launch(
        self,
        grid: tuple[int, int],
        items: Tensor,
        layer: AttentionLayer,
        q: Tensor,
        kv_cache: Tensor,
        plan: TritonPlan,
        results: tuple[Tensor, Tensor | None],
    ) -> None:
        spec, (out, lse) = self.spec, results
        alibi = {"slopes_ptr": layer.alibi_slopes} if spec.alibi else {}
        is_single = items is self._items
        tile = self._tile_of_singles(plan.num_single) if is_single else plan.tile
        attend, scales, sizes = kernel_of(spec, layer)
        attend[grid](
            q,
            kv_cache,
            out,
            lse,
            *(layer.sinks, *scales),
            plan.block_table,
            plan.seq_lens,
            plan.starts,
            items,
            self._num_items,
            self._partial,
            self._partial_lse,
            q.stride(0),
            q.stride(1),
            out.stride(0),
            kv_cache.stride(0),
            plan.block_table.stride(0),
            SCALE=spec.scale,
            SOFTCAP=spec.logit_softcap,
            WINDOW=spec.sliding_window,
            NUM_HEADS=spec.num_heads,
            GROUP=self._grouped.num_heads // self._grouped.num_kv_heads,
            BLOCK_SIZE=spec.block_size,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **sizes,
            SINGLE=is_single,
            INVARIANT=spec.batch_invariant,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **alibi,
            **overlap.options(),
        )


def _converts_e4m3(device: str) -> bool:
    """Answer whether a device has the instructions; one that cannot be asked is taken to."""
    is_asked = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return not is_asked or torch.cuda.get_device_capability(device) >= (8, 9)


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return min(torch.cuda.get_device_properties(device).multi_processor_count, MAX_SMS)


def _extra_items(num_rows: int, num_programs: int, spec: AttentionSpec) -> int:
    """Return how many items more than rows there may be, for so many programs of all KV heads.

    A quarter of the rows at least, so that the longest of many sequences are cut.
    """
    return max(-(-num_programs // spec.num_kv_heads) - num_rows, num_rows // 4, 1)
