"""A batch for an attention backend as a value: lengths, blocks, strides, and what fills memory.

A case says everything: inputs, block tables and batch are drawn from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from attrs import define, frozen
from torch import Tensor

from quire.interfaces.attention import AttentionSpec, BatchLimits
from quire.interfaces.batch import Batch, GroupBatch

LIMITS = BatchLimits(max_num_seqs=16, max_num_batched_tokens=4096, max_model_len=4096)
# So many sequences of a case are told one by one.
MOST_IN_WORDS = 12
# What shifts scores has this number in queries, the rest in keys.
SHIFTING_QUERY = 8.0
# What lies in memory that must not be read, or must be written. A NaN goes through every mask
# that multiplies; a large number goes through those that take NaN for zero.
POISONS = {"nan": float("nan"), "large": 3e4, "zero": 0.0}


@frozen(kw_only=True)
class Case:
    """A batch: (query length, length) of each sequence, those with one token first.

    `shared_blocks` are the first blocks that sequences have in common with the first one, as far
    as they lie in the past of both. `strided`: q, k and v are cut from wider tensors. `padding`
    rows of length 0 follow where the batch is one of a CUDA graph. `poison` is a key of `POISONS`.

    `shift`: all scores of keys lie about that far from zero. `groups_before`: KV-cache groups of
    the batch before the case's own. `spare_columns` of the block table belong to no sequence.
    `moved`: the past was written to other blocks, and these were copied.
    """

    spec: AttentionSpec
    lengths: tuple[tuple[int, int], ...]
    seed: int = 0
    shared_blocks: int = 0
    strided: bool = True
    padding: int = 0
    poison: str = "nan"
    shift: float = 0.0
    groups_before: int = 0
    spare_columns: int = 0
    moved: bool = False

    @property
    def poison_value(self) -> float:
        """Return the number that fills memory."""
        return POISONS[self.poison]

    def __str__(self) -> str:
        size = self.spec.block_size
        shown = self.lengths[:MOST_IN_WORDS]
        tokens = ", ".join(_in_words(query_len, seq_len) for query_len, seq_len in shown)
        if len(shown) < len(self.lengths):
            tokens += f" and {len(self.lengths) - len(shown)} more"
        words = [f"sequences of {tokens}", f"blocks of {size}", *_spec_in_words(self.spec)]
        if self.shared_blocks:
            words.append(f"{self.shared_blocks} shared blocks")
        if self.padding:
            words.append(f"{self.padding} padding rows")
        if self.shift:
            words.append(f"scores about {self.shift:g}")
        if self.groups_before:
            words.append(f"group {self.groups_before} of the batch")
        if self.spare_columns:
            words.append(f"{self.spare_columns} spare columns in the block table")
        if self.moved:
            words.append("blocks of the past copied from others")
        layout = "cut from wider tensors" if self.strided else "contiguous"
        return f"{'; '.join(words)}; q, k, v {layout}; seed {self.seed}"


def _in_words(query_len: int, seq_len: int) -> str:
    plural = "" if query_len == 1 else "s"
    return f"{query_len} new token{plural} after {seq_len - query_len}"


def _spec_in_words(spec: AttentionSpec) -> list[str]:
    """Return what of a spec is not as in the plainest model."""
    words = [f"{spec.num_heads} heads over {spec.num_kv_heads} KV heads of {spec.head_dim}"]
    if spec.latent is not None:
        words.append(f"latents of {spec.value_head_dim}, which are the values too")
    elif spec.value_head_dim != spec.head_dim:
        words.append(f"values of {spec.value_head_dim}")
    words += [spec.dtype, f"scale {spec.scale:.4g}"]
    if spec.has_quantized_kv:
        words.append(f"cache of {spec.kv_dtype}")
    if spec.sliding_window is not None:
        words.append(f"window {spec.sliding_window}")
    if spec.logit_softcap is not None:
        words.append(f"soft cap {spec.logit_softcap:g}")
    flags = {"sinks": spec.sinks, "ALiBi": spec.alibi, "bidirectional": not spec.causal}
    return words + [name for name, is_asked in flags.items() if is_asked]


@define(kw_only=True)
class Inputs:
    """Queries of the step, keys and values of all tokens, by sequence, and what a layer holds.

    Keys and values are those that are written; a quantized cache holds others.
    """

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    sinks: Tensor | None
    alibi: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@define(kw_only=True)
class Layer:
    """What a backend may read of a layer."""

    index: int = 0
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None


def limits_of(case: Case) -> BatchLimits:
    """Return limits that a case keeps; one of many sequences has as many as are allowed."""
    most = max(LIMITS.max_num_seqs, len(case.lengths) + case.padding)
    return attrs.evolve(LIMITS, max_num_seqs=most)


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

    inputs = Inputs(
        q=[2 * draw(n, spec.num_heads, spec.head_dim) for n, _ in case.lengths],
        k=[draw(n, spec.num_kv_heads, spec.head_dim) for _, n in case.lengths],
        v=[draw(n, spec.num_kv_heads, spec.value_head_dim) for _, n in case.lengths],
        sinks=torch.randn(spec.num_heads, generator=generator) if spec.sinks else None,
        alibi=torch.rand(spec.num_heads, generator=generator) if spec.alibi else None,
    )
    if spec.has_quantized_kv:
        inputs.k_scale, inputs.v_scale = draw_scales(spec, generator)
    if case.shift:
        _shift_scores(inputs, case)
    for i in range(1, len(case.lengths)):
        shared = num_shared(case, i) * spec.block_size
        inputs.k[i][:shared] = inputs.k[0][:shared]
        inputs.v[i][:shared] = inputs.v[0][:shared]
    if spec.latent is not None:
        inputs.v = [k[..., : spec.value_head_dim] for k in inputs.k]
    return inputs


def _shift_scores(inputs: Inputs, case: Case) -> None:
    """Let the first dimension add about `shift` to every score."""
    for q, k in zip(inputs.q, inputs.k, strict=True):
        q[..., 0] = SHIFTING_QUERY
        k[..., 0] = case.shift / (SHIFTING_QUERY * case.spec.scale)


def draw_scales(spec: AttentionSpec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return scales of keys and of values, another one a head; the smallest clip some numbers."""
    largest = torch.finfo(getattr(torch, spec.kv_dtype)).max
    drawn = torch.rand(2, spec.num_kv_heads, generator=generator)
    k_scale, v_scale = (2.0**drawn * 4 ** (2 * drawn) * 1.5 / largest).unbind()
    return k_scale, v_scale


def make_layer(case: Case, inputs: Inputs, *, index: int = 0) -> Layer:
    """Return the layer of the inputs, on the device of the case."""
    device = case.spec.device
    sinks = None if inputs.sinks is None else inputs.sinks.to(device)
    slopes = None if inputs.alibi is None else inputs.alibi.to(device)
    k_scale = None if inputs.k_scale is None else inputs.k_scale.to(device)
    v_scale = None if inputs.v_scale is None else inputs.v_scale.to(device)
    return Layer(index=index, sinks=sinks, alibi_slopes=slopes, k_scale=k_scale, v_scale=v_scale)


def num_shared(case: Case, i: int) -> int:
    """Return how many blocks sequence i > 0 has in common with the first one."""
    pasts = [seq_len - query_len for query_len, seq_len in (case.lengths[0], case.lengths[i])]
    return min(case.shared_blocks, *(past // case.spec.block_size for past in pasts))


def make_tables(case: Case) -> tuple[list[list[int]], int]:
    """Return shuffled block tables, and the number of blocks."""
    size = case.spec.block_size
    counts = [-(-seq_len // size) for _, seq_len in case.lengths]
    num_blocks = 1 + sum(counts) + 3
    generator = torch.Generator().manual_seed(case.seed + 1)
    order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables: list[list[int]] = []
    for i, count in enumerate(counts):
        shared = tables[0][: num_shared(case, i)] if i else []
        tables.append(shared + [order.pop() for _ in range(count - len(shared))])
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


def step_spans(case: Case) -> list[tuple[int, int]]:
    """Return the positions [first, last) that the step computes of each sequence."""
    return [(seq_len - query_len, seq_len) for query_len, seq_len in case.lengths]


def step_batch(case: Case) -> Batch:
    """Return the batch of the case's step, and nothing around it."""
    tables, _ = make_tables(case)
    return make_batch(step_spans(case), tables, case.spec.block_size, device=case.spec.device)


def first_visible(case: Case, query_len: int, seq_len: int) -> int:
    """Return the first position that some query of the step may see.

    Where nothing is poisoned, all of the past is there.
    """
    window = case.spec.sliding_window
    return (
        0 if window is None or case.poison == "zero" else max(0, seq_len - query_len - window + 1)
    )


def step_tensors(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the step's q, k and v as rotation leaves them, or each contiguous.

    q and k are cut from one tensor, v from another one, which is wider.
    """
    spec = case.spec
    k = torch.cat([k[-n:] for k, (n, _) in zip(inputs.k, case.lengths, strict=True)])
    v = torch.cat([v[-n:] for v, (n, _) in zip(inputs.v, case.lengths, strict=True)])
    q = torch.cat(inputs.q)
    if spec.latent is not None:
        q, k = _beside_each_other(q, k) if case.strided else (q, k)
        q, k = q.to(spec.device), k.to(spec.device)
        return q, k, k[..., : spec.value_head_dim]
    if not case.strided:
        return q.to(spec.device), k.to(spec.device), v.to(spec.device)
    q, k = _beside_each_other(q.to(spec.device), k.to(spec.device))
    qkv = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1).to(spec.device)), dim=1)
    own = qkv[:, -v.flatten(1).shape[1] :]
    return q, k, own.unflatten(1, (spec.num_kv_heads, spec.value_head_dim))


def _beside_each_other(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as parts of one tensor."""
    both = torch.cat((q, k), dim=1)
    return both[:, : q.shape[1]], both[:, q.shape[1] :]
