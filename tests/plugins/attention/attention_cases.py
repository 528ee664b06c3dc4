"""Ragged batches for attention backends, run through write, plan and attend on a poisoned cache.

Whatever no query of the step may see is NaN: unwritten slots, block 0, blocks of others, tokens
that left the window. The caller gets the outputs, and the cache before and after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, frozen
from torch import Tensor

from quire.interfaces.attention import AttentionBackend, AttentionSpec, BatchLimits
from quire.interfaces.batch import Batch, GroupBatch

# Where backends for GPUs are tested; on a CPU in Triton's interpreter.
GPU = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = BatchLimits(max_num_seqs=16, max_num_batched_tokens=4096, max_model_len=256)


@frozen(kw_only=True)
class Case:
    """A batch: (query length, length) of each sequence, those with one token first."""

    spec: AttentionSpec
    lengths: tuple[tuple[int, int], ...]
    seed: int = 0


@define(kw_only=True)
class Inputs:
    """Queries of the step, keys and values of all tokens, by sequence, and the layer's sinks."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    sinks: Tensor | None


@define(kw_only=True)
class Layer:
    """What a backend may read of a layer."""

    index: int = 0
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None


@define(kw_only=True)
class Run:
    """What came out, and which blocks the batch owned."""

    out: list[Tensor]
    lse: Tensor | None
    before: Tensor
    after: Tensor
    slots: Tensor
    tables: list[list[int]]


def make_spec(**changes: object) -> AttentionSpec:
    """Return a small spec with some values changed."""
    values = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "value_head_dim": 16,
        "scale": 0.25,
        "dtype": "float32",
        "kv_dtype": changes.get("dtype", "float32"),
        "block_size": 4,
        "device": "cpu",
    }
    return AttentionSpec(**{**values, **changes})  # type: ignore[arg-type]


def make_inputs(case: Case) -> Inputs:
    """Draw normal numbers; scores vary enough for the softmax to matter."""
    spec, generator = case.spec, torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, spec.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Inputs(
        q=[2 * draw(n, spec.num_heads, spec.head_dim) for n, _ in case.lengths],
        k=[draw(n, spec.num_kv_heads, spec.head_dim) for _, n in case.lengths],
        v=[draw(n, spec.num_kv_heads, spec.value_head_dim) for _, n in case.lengths],
        sinks=torch.randn(spec.num_heads, generator=generator) if spec.sinks else None,
    )


def make_tables(case: Case) -> tuple[list[list[int]], int]:
    """Return shuffled block tables that share nothing, and the number of blocks."""
    size = case.spec.block_size
    counts = [-(-seq_len // size) for _, seq_len in case.lengths]
    num_blocks = 1 + sum(counts) + 3
    generator = torch.Generator().manual_seed(case.seed + 1)
    order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables = []
    for count in counts:
        tables.append([order.pop() for _ in range(count)])
    return tables, num_blocks


def make_batch(
    spans: Sequence[tuple[int, int]],
    tables: list[list[int]],
    block_size: int,
    *,
    device: str = "cpu",
) -> Batch:
    """Return the batch that computes positions [first, last) of each sequence."""
    positions, slots, query_lens = [], [], []
    for (first, last), table in zip(spans, tables, strict=True):
        query_lens.append(last - first)
        for position in range(first, last):
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
    width = max(-(-last // block_size) for _, last in spans)
    padded = [(table + [0] * width)[:width] for table in tables]

    def ints(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    seq_lens = [last for _, last in spans]
    return Batch(
        token_ids=ints([0] * len(positions)),
        positions=ints(positions),
        cu_seqlens_q=torch.nn.functional.pad(ints(query_lens).cumsum(0).int(), (1, 0)),
        seq_lens=ints(seq_lens),
        logit_rows=ints([]),
        rows=ints(range(len(spans))),
        groups=(GroupBatch(block_table=ints(padded), slot_mapping=ints(slots)),),
        query_lens=query_lens,
        seq_lens_bound=seq_lens,
        num_single_token_seqs=query_lens.count(1),
        padded_to=len(spans),
    )


def first_visible(case: Case, query_len: int, seq_len: int) -> int:
    """Return the first position that some query of the step may see."""
    window = case.spec.sliding_window
    return 0 if window is None else max(0, seq_len - query_len - window + 1)


def write_past(backend: AttentionBackend, case: Case, inputs: Inputs, cache: Tensor) -> None:
    """Write what earlier steps wrote, as far as it may still be read."""
    tables, _ = make_tables(case)
    chosen = []
    for i, (query_len, seq_len) in enumerate(case.lengths):
        span = (first_visible(case, query_len, seq_len), seq_len - query_len)
        if span[0] < span[1]:
            chosen.append((span, i))
    chosen.sort(key=lambda pair: pair[0][1] - pair[0][0] > 1)
    if not chosen:
        return
    spans = [span for span, _ in chosen]
    chosen_tables, device = [tables[i] for _, i in chosen], case.spec.device
    batch = make_batch(spans, chosen_tables, case.spec.block_size, device=device)
    k = torch.cat([inputs.k[i][first:last] for (first, last), i in chosen]).to(device)
    v = torch.cat([inputs.v[i][first:last] for (first, last), i in chosen]).to(device)
    plan = backend.plan(batch, 0)
    backend.prepare(plan)
    backend.write(Layer(sinks=inputs.sinks), k, v, cache, plan)


def run(
    backend_class: type[AttentionBackend], case: Case, inputs: Inputs, *, wants_lse: bool = False
) -> Run:
    """Run one step of the batch and return what it gave and what it changed, on the CPU."""
    spec, nan = case.spec, float("nan")
    backend = backend_class(spec, LIMITS, {})
    tables, num_blocks = make_tables(case)
    layout = backend_class.kv_layout(spec)
    shape = (num_blocks, *layout.block_shape)
    cache = torch.full(shape, nan, dtype=getattr(torch, layout.dtype), device=spec.device)
    write_past(backend, case, inputs, cache)
    before = cache.cpu().clone()
    spans = [(seq_len - query_len, seq_len) for query_len, seq_len in case.lengths]
    batch = make_batch(spans, tables, spec.block_size, device=spec.device)
    q, k, v = step_tensors(case, inputs)
    out = q.new_full((len(q), spec.num_heads, spec.value_head_dim), nan)
    lse = q.new_full(out.shape[:2], nan, dtype=torch.float32) if wants_lse else None
    layer = Layer(sinks=None if inputs.sinks is None else inputs.sinks.to(spec.device))
    plan = backend.plan(batch, 0)
    backend.prepare(plan)
    backend.write(layer, k, v, cache, plan)
    backend.attend(layer, q, k, v, cache, plan, out, lse)
    return Run(
        out=list(out.cpu().split(batch.query_lens)),
        lse=None if lse is None else lse.cpu(),
        before=before,
        after=cache.cpu(),
        slots=batch.groups[0].slot_mapping.cpu().long(),
        tables=tables,
    )


def step_tensors(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the step's q, k and v, strided as if they were cut from one qkv."""
    spec = case.spec
    k = torch.cat([k[-n:] for k, (n, _) in zip(inputs.k, case.lengths, strict=True)])
    v = torch.cat([v[-n:] for v, (n, _) in zip(inputs.v, case.lengths, strict=True)])
    parts = [torch.cat(inputs.q).flatten(1), k.flatten(1), v.flatten(1)]
    sizes = [part.shape[1] for part in parts]
    q, k, v = torch.cat(parts, dim=1).to(spec.device).split(sizes, dim=1)
    return (
        q.unflatten(1, (spec.num_heads, spec.head_dim)),
        k.unflatten(1, (spec.num_kv_heads, spec.head_dim)),
        v.unflatten(1, (spec.num_kv_heads, spec.value_head_dim)),
    )
