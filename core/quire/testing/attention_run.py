"""Run one step of a case through a backend's write, plan and attend, in poisoned memory.

Whatever no query of the step may see is poison: unwritten slots, block 0, blocks of others,
tokens that left the window, the outputs before they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import Factory, define, frozen
from torch import Tensor

from quire.interfaces.attention import AttentionBackend
from quire.interfaces.batch import Batch
from quire.testing.attention_cases import (
    Case,
    Inputs,
    Layer,
    first_visible,
    limits_of,
    make_batch,
    make_layer,
    make_tables,
    step_tensors,
)
from quire.testing.attention_surroundings import (
    enclosed,
    group_of,
    poisoned_outputs,
    step_of,
    surrounded,
)
from quire.testing.bound import bits


@frozen(kw_only=True)
class Subject:
    """The backend that is checked, and the options that it is made with."""

    backend: type[AttentionBackend]
    options: Mapping[str, Any] = Factory(dict)

    def make(self, case: Case) -> AttentionBackend:
        """Return an instance for the case."""
        return self.backend(case.spec, limits_of(case), dict(self.options))


@define(kw_only=True)
class Run:
    """What came out by sequence, what the cache held before and after, and the step's slots.

    `changed` names an input that the backend changed, `overrun` memory beyond a tensor's ends that
    it wrote to, which it must not.
    """

    out: list[Tensor]
    lse: Tensor | None
    before: Tensor
    after: Tensor
    slots: Tensor
    tables: list[list[int]]
    changed: str | None = None
    overrun: str | None = None


def make_cache(backend: type[AttentionBackend], case: Case) -> Tensor:
    """Return a poisoned cache for one layer of the case."""
    layout, (_, num_blocks) = backend.kv_layout(case.spec), make_tables(case)
    dtype = getattr(torch, layout.dtype)
    shape = (num_blocks, *layout.block_shape)
    return torch.full(shape, poison_of(case, dtype), dtype=dtype, device=case.spec.device)


def poison_of(case: Case, dtype: torch.dtype) -> float:
    """Return the number that fills a cache of a dtype."""
    if not case.spec.has_quantized_kv:
        return case.poison_value
    return min(case.poison_value, torch.finfo(dtype).max)


def write_past(backend: AttentionBackend, case: Case, inputs: Inputs, cache: Tensor) -> None:
    """Write what earlier steps wrote, as far as it may still be read.

    Of a case that is moved, to other blocks, which are then copied as the core copies blocks.
    """
    if not case.moved:
        _write_steps(backend, case, inputs, cache, make_tables(case)[0])
        return
    tables, num_blocks = make_tables(case)
    earlier = make_cache(type(backend), case)
    turned = [[num_blocks - block for block in table] for table in tables]
    _write_steps(backend, case, inputs, earlier, turned)
    cache.view(torch.uint8)[1:] = earlier.view(torch.uint8)[1:].flip(0)


def _write_steps(
    backend: AttentionBackend, case: Case, inputs: Inputs, cache: Tensor, tables: list[list[int]]
) -> None:
    chosen = []
    for i, (query_len, seq_len) in enumerate(case.lengths):
        span = (first_visible(case, query_len, seq_len), seq_len - query_len)
        if span[0] < span[1]:
            chosen.append((span, i))
    chosen.sort(key=lambda pair: pair[0][1] - pair[0][0] > 1)
    most = limits_of(case).max_num_batched_tokens
    if sum(last - first for (first, last), _ in chosen) <= most:
        steps = [chosen] if chosen else []
    else:
        steps = [[one] for one in chosen]
    for step in steps:
        _write_spans(backend, case, inputs, cache, [(*one, tables[one[1]]) for one in step])
        if cache.is_cuda and len(steps) > 1:
            # A plan may write its staging again only when the last step with it has ended.
            torch.cuda.synchronize(cache.device)


def _write_spans(
    backend: AttentionBackend,
    case: Case,
    inputs: Inputs,
    cache: Tensor,
    chosen: list[tuple[tuple[int, int], int, list[int]]],
) -> None:
    """Write positions [first, last) of some sequences, in blocks of tables, in one step."""
    device = case.spec.device
    spans, own = [span for span, *_ in chosen], [table for *_, table in chosen]
    batch = surrounded(make_batch(spans, own, case.spec.block_size, device=device), case)
    k = torch.cat([inputs.k[i][first:last] for (first, last), i, _ in chosen]).to(device)
    v = torch.cat([inputs.v[i][first:last] for (first, last), i, _ in chosen]).to(device)
    plan = backend.plan(batch, group_of(batch))
    backend.prepare(plan)
    backend.write(make_layer(case, inputs), k, v, cache, plan)


def run(
    backend_class: type[AttentionBackend],
    case: Case,
    inputs: Inputs,
    *,
    wants_lse: bool = False,
    options: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> Run:
    """Run one step of the batch and return what it gave and what it changed, on the CPU.

    `fresh`: the step has an instance of its own, that knows no earlier one.
    """
    subject = Subject(backend=backend_class, options=options or {})
    backend, memory = subject.make(case), enclosed(make_cache(backend_class, case))
    cache = memory.blocks
    write_past(backend, case, inputs, cache)
    before = cache.cpu().clone()
    batch, layer = step_of(case), make_layer(case, inputs)
    q, k, v = step_tensors(case, inputs)
    watched = watched_tensors(q, k, v, batch, layer)
    copies = {name: tensor.clone() for name, tensor in watched.items()}
    lists = list(batch.query_lens), list(batch.seq_lens_bound)
    given = poisoned_outputs(case, q, wants_lse=wants_lse)
    if fresh:
        backend = subject.make(case)
    plan = backend.plan(batch, group_of(batch))
    backend.prepare(plan)
    backend.write(layer, k, v, cache, plan)
    backend.attend(layer, q, k, v, cache, plan, given.out, given.lse)
    changed = [
        name for name, was in copies.items() if not torch.equal(bits(watched[name]), bits(was))
    ]
    if lists != (batch.query_lens, batch.seq_lens_bound):
        changed.append("batch.query_lens or batch.seq_lens_bound")
    return Run(
        out=list(given.out.cpu().split([n for n, _ in case.lengths])),
        lse=None if given.lse is None else given.lse.cpu(),
        before=before,
        after=cache.cpu(),
        slots=batch.groups[-1].slot_mapping.cpu().long(),
        tables=make_tables(case)[0],
        changed=changed[0] if changed else None,
        overrun="the cache" if memory.is_overrun else given.overrun,
    )


def watched_tensors(
    q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: Layer
) -> dict[str, Tensor]:
    """Return what a backend reads and must not change, by name."""
    group = batch.groups[-1]
    names = ("sinks", "alibi_slopes", "k_scale", "v_scale")
    own = {f"layer.{name}": getattr(layer, name) for name in names}
    return {
        **{name: tensor for name, tensor in own.items() if tensor is not None},
        "q": q,
        "k": k,
        "v": v,
        "batch.positions": batch.positions,
        "batch.cu_seqlens_q": batch.cu_seqlens_q,
        "batch.seq_lens": batch.seq_lens,
        "block_table": group.block_table,
        "slot_mapping": group.slot_mapping,
    }
