"""One of the library's modules for batches over pages, and the memory that its plans lie in."""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from quire.interfaces.attention import AttentionSpec, BatchLimits, GraphSupport
from quire.interfaces.batch import Batch
from quire_attention.flashinfer.pages import PageLists, most_pages, page_lists, schedule_bytes
from quire_kernels.head_token_kv import keys_and_values

# The library's numbers of masks and layouts.
NOT_CAUSAL, CAUSAL = 0, 1
TOKENS_BEFORE_HEADS = 0
NO_WINDOW = -1


@frozen(kw_only=True)
class Part:
    """Sequences that follow one another in a batch, planned for one module.

    `first_token`, `num_tokens`: their rows of q and out. `info` is what the library planned.
    """

    kernel: PagedAttention
    info: Any
    first_token: int
    num_tokens: int
    num_rows: int

    def run(self, q: Tensor, kv_cache: Tensor, out: Tensor, lse: Tensor | None) -> None:
        """Attend the part's own rows; `lse`, of the same rows, is left to base 2."""
        rows = slice(self.first_token, self.first_token + self.num_tokens)
        self.kernel.run(self, q[rows], kv_cache, out[rows], None if lse is None else lse[rows])


class PageMemory:
    """Lists of a step's pages on the device, at fixed addresses, and where they come from.

    They go up from pinned memory, which is written again when the step with the same slot has been
    collected. Steps follow one another on a stream, so that one place on the device is enough.
    """

    def __init__(self, spec: AttentionSpec, limits: BatchLimits, device: torch.device) -> None:
        num_rows, num_pages = limits.max_num_seqs, most_pages(spec, limits)
        self._starts = (0, num_rows + 1, 2 * num_rows + 2, 3 * num_rows + 2)
        slots, length = limits.max_steps_in_flight + 2, self._starts[-1] + num_pages
        self._memory = torch.zeros(length, dtype=torch.int32, device=device)
        self._pages = torch.zeros(num_pages, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._staged = torch.zeros(slots, length, dtype=torch.int32, pin_memory=pinned)

    @staticmethod
    def num_entries(spec: AttentionSpec, limits: BatchLimits) -> int:
        """Return how many int32 it holds on the device."""
        return 3 * limits.max_num_seqs + 2 + 2 * most_pages(spec, limits)

    def upload(self, lists: PageLists, block_table: Tensor, slot: int) -> None:
        """Enqueue the upload of the lists, and fetch the pages' block ids on the device."""
        staged = self._staged[slot].numpy()
        parts = (lists.query_starts, lists.kv_starts, lists.last_lens, lists.sources)
        for start, values in zip(self._starts, parts, strict=True):
            staged[start : start + len(values)] = values
        num_pages = len(lists.sources)
        used = self._starts[-1] + num_pages
        self._memory[:used].copy_(self._staged[slot, :used], non_blocking=True)
        if num_pages:
            sources = self._memory[self._starts[-1] : used]
            torch.index_select(_flat(block_table), 0, sources, out=self._pages[:num_pages])

    def views(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query starts, kv starts, pages and last lengths of so many rows.

        Pages are all that there is room for: a step may be captured with none, and a tensor without
        entries has no address.
        """
        query, kv, last, _ = self._starts
        return (
            self._memory[query : query + num_rows + 1],
            self._memory[kv : kv + num_rows + 1],
            self._pages,
            self._memory[last : last + num_rows],
        )


def _flat(block_table: Tensor) -> Tensor:
    """Return the table's memory from its first entry to its last."""
    num_rows, width = block_table.shape
    length = (num_rows - 1) * block_table.stride(0) + width
    return block_table.as_strided((length,), (1,))


class PagedAttention:
    """Plan and attend with one module.

    `module` has the library's `plan` and `paged_run`; `kernel` is its name of the kernels, "fa2"
    or "fa3". `partial` is memory for partial results, which modules of one stream may share.
    """

    def __init__(
        self,
        module: Any,
        spec: AttentionSpec,
        limits: BatchLimits,
        *,
        kernel: str,
        causal: bool,
        partial: Tensor,
        num_sms: int,
    ) -> None:
        self._module, self.spec = module, spec
        self._is_fa2, self._causal, self._partial = kernel == "fa2", causal, partial
        device, length = partial.device, schedule_bytes(spec, limits, num_sms)
        self._lists = PageMemory(spec, limits, device)
        self._schedule = torch.zeros(length, dtype=torch.uint8, device=device)
        slots, pinned = limits.max_steps_in_flight + 2, device.type == "cuda"
        self._staged = torch.zeros(slots, length, dtype=torch.uint8, pin_memory=pinned)
        self._window = NO_WINDOW if spec.sliding_window is None else spec.sliding_window - 1
        # Launches may overlap the end of the kernel before them where the GPU knows how.
        self._overlaps = pinned and torch.cuda.get_device_capability(device) >= (9, 0)

    def plan(self, batch: Batch, group: int, *, first: int, end: int) -> Part:
        """Plan the batch's sequences from `first` to `end`, with what the host knows of them.

        Where a CUDA graph is captured or replayed, `end` counts the padding rows too, and shapes,
        addresses and launches depend on it alone.
        """
        spec, table = self.spec, batch.groups[group].block_table
        table = table if table.stride(1) == 1 else table.contiguous()
        num_rows, is_captured = end - first, batch.captured_for is not GraphSupport.NONE
        # Padding has a token and no keys, of which the kernels make zeros.
        query_lens = [1] * num_rows if is_captured else batch.query_lens[first:end]
        lists = page_lists(
            query_lens,
            batch.seq_lens_bound[first : min(end, batch.num_seqs)],
            block_size=spec.block_size,
            first_row=first,
            num_rows=num_rows,
            table_stride=table.stride(0),
        )
        self._lists.upload(lists, table, batch.in_flight_slot)
        num_tokens = sum(query_lens)
        info = self._planned(lists, batch.in_flight_slot, num_tokens, is_captured=is_captured)
        return Part(
            kernel=self,
            info=info,
            first_token=sum(batch.query_lens[:first]),
            num_tokens=num_tokens,
            num_rows=num_rows,
        )

    def _planned(self, lists: PageLists, slot: int, num_tokens: int, *, is_captured: bool) -> Any:
        spec = self.spec
        # How keys are cut: not by a fixed size, where it is worth it, beside no other kernel.
        cut = (-1, False, 0) if self._is_fa2 else ()
        return self._module.plan(
            self._partial,
            self._schedule,
            self._staged[slot],
            torch.from_numpy(lists.query_starts),
            torch.from_numpy(lists.kv_starts),
            torch.from_numpy(lists.seq_lens),
            num_tokens,
            len(lists.seq_lens),
            spec.num_heads,
            spec.num_kv_heads,
            spec.block_size,
            is_captured,
            spec.head_dim,
            spec.value_head_dim,
            self._causal,
            self._window,
            *cut,
        )

    def run(self, part: Part, q: Tensor, kv_cache: Tensor, out: Tensor, lse: Tensor | None) -> None:
        """Attend `q` [num_tokens, num_heads, head_dim] into `out`, which is contiguous."""
        query_starts, kv_starts, pages, last_lens = self._lists.views(part.num_rows)
        no_custom_mask_nor_alibi_nor_items = (None,) * 6
        no_fp8_scales = (None,) * 3
        no_rotation = (1.0, 1e4)
        self._module.paged_run(
            self._partial,
            self._schedule,
            part.info,
            q,
            *keys_and_values(kv_cache, self.spec.head_dim),
            query_starts,
            kv_starts,
            pages,
            last_lens,
            out,
            lse,
            CAUSAL if self._causal else NOT_CAUSAL,
            TOKENS_BEFORE_HEADS,
            self._window,
            self._overlaps,
            *no_custom_mask_nor_alibi_nor_items,
            self.spec.logit_softcap or 0.0,
            self.spec.scale,
            *no_fp8_scales,
            *no_rotation,
            0,
            self._partial.numel(),
        )
