"""Checks of what a write changes: each slot has memory of its own, and no other one is touched."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from quire.interfaces.attention import AttentionBackend
from quire.testing.attention_cases import Case, make_batch, make_inputs, make_layer, make_tables
from quire.testing.attention_run import Subject, make_cache
from quire.testing.bound import bits
from quire.testing.diagnosis import STALE
from quire.testing.kit_report import Failure

# So many slots of a block are looked at.
MOST_SLOTS = 64


def check_next_slots(subject: Subject, case: Case, changed: Tensor) -> Failure | None:
    """Return a failure where the slot behind a sequence's last token was `changed` [blocks, bytes].

    It is written by itself, to see which bytes it has.
    """
    size, device = case.spec.block_size, case.spec.device
    open_ = [i for i, (_, seq_len) in enumerate(case.lengths) if seq_len % size]
    if not open_:
        return None
    tables = [make_tables(case)[0][i] for i in open_]
    spans = [(case.lengths[i][1], case.lengths[i][1] + 1) for i in open_]
    batch = make_batch(spans, tables, size, device=device)
    backend, cache, inputs = (
        subject.make(case),
        make_cache(subject.backend, case),
        make_inputs(case),
    )
    k, v = (torch.stack([x[i][-1] for i in open_]).to(device) for x in (inputs.k, inputs.v))
    before = bits(cache.clone()).flatten(1)
    plan = backend.plan(batch, 0)
    backend.prepare(plan)
    backend.write(make_layer(case, inputs), k, v, cache, plan)
    own = (bits(cache).flatten(1) != before).cpu()
    own[0] = False
    if not bool((own & changed).any()):
        return None
    what = "the slot behind a sequence's last token was written"
    return Failure(what=what, case=case, guess="a token is written to two slots")


def check_slots(subject: Subject, case: Case) -> Failure | None:
    """Each slot has memory of its own, in its own block."""
    case = attrs.evolve(case, lengths=((1, 1),), poison="nan", shared_blocks=0)
    failure = _slots_apart(case, subject, fresh=False)
    if failure is not None and _slots_apart(case, subject, fresh=True) is None:
        return attrs.evolve(failure, guess=STALE)
    return failure


def _slots_apart(case: Case, subject: Subject, *, fresh: bool) -> Failure | None:
    """Write to each slot of a block; `fresh`: each time by an instance that knows no other."""
    backend = subject.make(case)
    written: dict[int, Tensor] = {}
    taken: Tensor | None = None
    for offset in _offsets(case.spec.block_size):
        backend = subject.make(case) if fresh else backend
        changed = _changed_by_writing(offset, case, subject, backend)
        where = f"writing slot {offset} of block 2"
        if changed.any(1).nonzero().flatten().tolist() != [2]:
            return Failure(what=f"{where} changed other blocks, or nothing", case=case)
        if taken is not None and bool((changed[2] & taken).any()):
            owners = [slot for slot, own in written.items() if bool((changed[2] & own).any())]
            what = f"{where} changed what belongs to slot {owners[0]}"
            return Failure(what=what, case=case, guess="a token is written to two slots")
        written[offset] = changed[2]
        taken = changed[2] if taken is None else taken | changed[2]
    return None


def _offsets(size: int) -> list[int]:
    """Return slots of a block that are written in turn: of a large one its ends and its middle."""
    if size <= MOST_SLOTS:
        return list(range(size))
    quarter = MOST_SLOTS // 4
    middle = size // 2
    return [
        *range(quarter),
        *range(middle - quarter, middle + quarter),
        *range(size - quarter, size),
    ]


def _changed_by_writing(
    offset: int, case: Case, subject: Subject, backend: AttentionBackend
) -> Tensor:
    """Return which bytes [blocks, bytes] change where a slot of block 2 is written."""
    spec = case.spec
    cache = torch.cat([make_cache(subject.backend, case)] * 2)
    batch = make_batch([(offset, offset + 1)], [[2]], spec.block_size, device=spec.device)
    inputs = make_inputs(attrs.evolve(case, seed=offset))
    plan = backend.plan(batch, 0)
    backend.prepare(plan)
    before = bits(cache.clone()).flatten(1)
    k, v = inputs.k[0].to(spec.device), inputs.v[0].to(spec.device)
    backend.write(make_layer(case, inputs), k, v, cache, plan)
    changed = bits(cache).flatten(1) != before
    changed[0] = False
    return changed
