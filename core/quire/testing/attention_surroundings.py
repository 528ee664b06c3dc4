"""What lies around a step's tensors in an engine: other groups, wider tables, memory of others."""

from __future__ import annotations

import math

import attrs
import torch
from attrs import define
from torch import Tensor

from quire.interfaces.batch import Batch, GroupBatch
from quire.testing.attention_cases import Case, make_tables, step_batch
from quire.testing.bound import bits

# Rows behind an output, as many as a large tile of a kernel has.
ROWS_BEHIND = 128
# What the address of a cache is a multiple of, in bytes.
ALIGNMENT = 256


def group_of(batch: Batch) -> int:
    """Return the number of the group that is looked at: the last one."""
    return len(batch.groups) - 1


def surrounded(batch: Batch, case: Case) -> Batch:
    """Return a batch as an engine has it, where the case asks for more than its own tensors.

    Groups before its own have the slots of a block that nobody reads, and block 0 in their tables.
    The table is wider than the longest sequence; behind its own blocks stand an earlier owner's.
    """
    [own] = batch.groups
    if case.spare_columns:
        own = attrs.evolve(own, block_table=_widened(own.block_table, batch, case))
    return attrs.evolve(batch, groups=(*decoys(case, own), own))


def step_of(case: Case) -> Batch:
    """Return the batch of the case's step."""
    return surrounded(step_batch(case), case)


def _widened(table: Tensor, batch: Batch, case: Case) -> Tensor:
    size, (rows, width) = case.spec.block_size, table.shape
    wide = table.new_full((rows, width + case.spare_columns), spare_block(case))
    for row, seq_len in enumerate(batch.seq_lens_bound):
        used = -(-seq_len // size)
        wide[row, :used] = table[row, :used]
    return wide


def decoys(case: Case, own: GroupBatch) -> tuple[GroupBatch, ...]:
    """Return the groups before a case's own."""
    table, size = own.block_table, case.spec.block_size
    slots = own.slot_mapping % size + spare_block(case) * size
    group = GroupBatch(block_table=torch.zeros_like(table), slot_mapping=slots)
    return (group,) * case.groups_before


def spare_block(case: Case) -> int:
    """Return a block of the cache that belongs to nobody: it holds poison."""
    tables, num_blocks = make_tables(case)
    used = {block for table in tables for block in table}
    return next(block for block in range(num_blocks - 1, 0, -1) if block not in used)


@define(kw_only=True)
class Outputs:
    """`out` and `lse`, full of NaN, at the beginning of longer memory of NaN."""

    out: Tensor
    lse: Tensor | None
    behind: dict[str, Tensor]

    @property
    def overrun(self) -> str | None:
        """The output behind whose last token something was written."""
        return next((name for name, x in self.behind.items() if not bool(x.isnan().all())), None)


def poisoned_outputs(case: Case, q: Tensor, *, wants_lse: bool) -> Outputs:
    """Return `out`, and `lse` where it is wanted, for the tokens of q."""
    num_tokens, spec = len(q), case.spec
    shape = (num_tokens + ROWS_BEHIND, spec.num_heads, spec.value_head_dim)
    out, lse = q.new_full(shape, float("nan")), None
    behind = {"out": out[num_tokens:]}
    if wants_lse:
        lse = q.new_full(shape[:2], float("nan"), dtype=torch.float32)
        behind["lse"] = lse[num_tokens:]
        lse = lse[:num_tokens]
    return Outputs(out=out[:num_tokens], lse=lse, behind=behind)


@define(kw_only=True)
class Cache:
    """A cache between blocks that are not of it."""

    blocks: Tensor
    around: tuple[Tensor, Tensor]
    copies: tuple[Tensor, Tensor]

    @property
    def is_overrun(self) -> bool:
        """Whether something was written before its first block or behind its last one."""
        pairs = zip(self.around, self.copies, strict=True)
        return not all(torch.equal(bits(now), bits(was)) for now, was in pairs)


def enclosed(cache: Tensor) -> Cache:
    """Copy a cache of poison to the middle of longer memory of the same."""
    block_bytes = cache[0].numel() * cache.element_size()
    more = ALIGNMENT // math.gcd(block_bytes, ALIGNMENT)
    poison = cache[:1].expand(more, *cache.shape[1:])
    memory = torch.cat((poison, cache, poison))
    around = memory[:more], memory[len(memory) - more :]
    copies = around[0].clone(), around[1].clone()
    return Cache(blocks=memory[more : len(memory) - more], around=around, copies=copies)
