"""How an engine uses its device, once everything is chosen and sized."""

from __future__ import annotations

from typing import Any

from attrs import define

from quire.execution.kv_cache import LayerGroup, bytes_per_slab, cache_groups, rows_of_slabs
from quire.execution.kv_scales import describe_source
from quire.execution.kv_sizing import KVSize
from quire.execution.memory import MemoryBudget
from quire.interfaces.attention import BatchLimits
from quire.interfaces.plugin import Selection
from quire.scheduling.output import KVCacheGroup


@define(kw_only=True)
class Layout:
    """How the engine uses its device: what was chosen, and where the memory goes.

    `kv_scales` says where those of a quantized KV cache come from, None where none is.
    """

    groups: list[LayerGroup]
    selections: list[Selection]
    kv_size: KVSize
    budget: MemoryBudget
    limits: BatchLimits
    self_check: list[str]
    kv_scales: str | None

    def cache_groups(self) -> list[KVCacheGroup]:
        """Return the groups as the block manager sees them."""
        return cache_groups(self.groups, self.kv_size.num_blocks)

    @property
    def has_kv_cache(self) -> bool:
        """Whether any layer keeps keys and values: an encoder's do not."""
        return any(group.has_cache for group in self.groups)

    @property
    def kv_scales_in_words(self) -> str | None:
        """Where the scales of the KV cache come from."""
        return describe_source(self.kv_scales)

    @property
    def windows(self) -> dict[str, Any] | None:
        """What windows save the longest sequence, None where no layer has one."""
        if all(group.spec.sliding_window is None for group in self.groups):
            return None
        length = self.kv_size.max_model_len
        whole = sum(g.bytes_per_block * -(-length // g.spec.block_size) for g in self.groups)
        return {
            "layers": [[len(g.layers), g.spec.sliding_window] for g in self.groups],
            "layers_a_slab": rows_of_slabs(self.groups),
            "sequence_tokens": length,
            "sequence_bytes": self.kv_size.a_sequence * bytes_per_slab(self.groups),
            "sequence_bytes_without_windows": whole,
        }
