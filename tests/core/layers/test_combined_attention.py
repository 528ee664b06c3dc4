"""Two backends on one cache: each gets its own sequences, and together they are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broken_plans import FusedGather
from gather_attention import GatherAttention

from quire.interfaces.attention import AttentionBackend, AttentionSpec, BatchLimits, GraphSupport
from quire.interfaces.batch import Batch
from quire.layers.combined_attention import combine
from quire.testing import AttentionBackendTests
from quire.testing.attention_cases import LIMITS, Case, make_spec, step_batch
from quire_attention.reference.backend import ReferenceAttention
from quire_attention.sdpa.backend import SdpaAttention

SPEC = make_spec()
SMALL = (SPEC, make_spec(dtype="bfloat16", num_heads=6), make_spec(sliding_window=5))


class TestReferenceAndSdpa(AttentionBackendTests):
    backend = combine(ReferenceAttention, SdpaAttention)


class TestFusedPrefillAlone(AttentionBackendTests):
    """The other part is normed and rotated by the core's own steps."""

    backend = combine(FusedGather, GatherAttention)
    specs = SMALL


class TestFusedDecodeAlone(AttentionBackendTests):
    backend = combine(GatherAttention, FusedGather)
    specs = SMALL


class Keeping(GatherAttention):
    """Keep the batches that are planned."""

    def __init__(self, spec: AttentionSpec, limits: BatchLimits, options: Any) -> None:
        super().__init__(spec, limits, options)
        self.batches: list[Batch] = []

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec, limits: BatchLimits) -> int:
        return limits.max_num_seqs

    def plan(self, batch: Batch, group: int) -> Any:
        self.batches.append(batch)
        return super().plan(batch, group)


class Invariant(Keeping):
    batch_invariant = True
    graph_support = GraphSupport.NONE


def make(options: dict[str, Any] | None = None) -> Any:
    return combine(Keeping, Keeping)(SPEC, LIMITS, options or {})


def test_mixed_batch_is_cut_where_single_tokens_end() -> None:
    combined = make()
    batch = step_batch(Case(spec=SPEC, lengths=((1, 9), (1, 4), (3, 5), (2, 2))))

    combined.plan(batch, 0)

    [decode], [prefill] = combined.decode.batches, combined.prefill.batches
    assert (decode.query_lens, decode.seq_lens_bound) == ([1, 1], [9, 4])
    assert (prefill.query_lens, prefill.seq_lens_bound) == ([3, 2], [5, 2])
    assert (decode.num_single_token_seqs, prefill.num_single_token_seqs) == (2, 0)
    assert decode.cu_seqlens_q.tolist() == [0, 1, 2]
    assert prefill.cu_seqlens_q.tolist() == [0, 3, 5]
    assert prefill.positions.tolist() == [2, 3, 4, 0, 1]
    assert prefill.seq_lens.tolist() == [5, 2]
    assert torch.equal(prefill.groups[0].block_table, batch.groups[0].block_table[2:])
    assert torch.equal(prefill.groups[0].slot_mapping, batch.groups[0].slot_mapping[2:])
    assert (decode.padded_to, prefill.padded_to) == (2, 2)


@pytest.mark.parametrize(
    ("lengths", "part"), [(((1, 9), (1, 4)), "decode"), (((3, 5), (2, 2)), "prefill")]
)
def test_batch_of_one_kind_is_handed_over_whole(
    lengths: tuple[tuple[int, int], ...], part: str
) -> None:
    combined = make()
    batch = step_batch(Case(spec=SPEC, lengths=lengths))

    combined.plan(batch, 0)

    other = {"decode": "prefill", "prefill": "decode"}[part]
    assert getattr(combined, part).batches == [batch]
    assert getattr(combined, other).batches == []


def test_options_and_memory_are_those_of_both() -> None:
    combined = make({"prefill": {"n": 1}, "decode": {"n": 2}})

    assert (combined.prefill.options, combined.decode.options) == ({"n": 1}, {"n": 2})
    assert type(combined).workspace_bytes(SPEC, LIMITS) == 2 * LIMITS.max_num_seqs


@pytest.mark.parametrize(
    ("prefill", "decode", "graphs", "invariant"),
    [
        (Keeping, Keeping, GraphSupport.SINGLE_TOKEN, False),
        (Invariant, Keeping, GraphSupport.SINGLE_TOKEN, False),
        (Keeping, Invariant, GraphSupport.NONE, False),
        (Invariant, Invariant, GraphSupport.NONE, True),
    ],
)
def test_graphs_are_the_decoders_and_invariance_is_boths(
    prefill: type[AttentionBackend],
    decode: type[AttentionBackend],
    graphs: GraphSupport,
    invariant: bool,
) -> None:
    combined = combine(prefill, decode)

    assert (combined.graph_support, combined.batch_invariant) == (graphs, invariant)


def test_reasons_say_whose_they_are() -> None:
    sinks = make_spec(sinks=True)

    assert combine(ReferenceAttention, SdpaAttention).why_unsupported(SPEC) is None
    reason = combine(ReferenceAttention, SdpaAttention).why_unsupported(sinks)
    assert reason == "decode: it has no attention sinks"
    reason = combine(ReferenceAttention, GatherAttention).why_unsupported(SPEC)
    assert reason is not None
    assert reason.startswith("the two share no KV cache: prefill keeps 'token-head-kv' ([4, 2, 32]")


def test_quantized_caches_are_those_of_both() -> None:
    class OneKind(ReferenceAttention):
        quantized_kv = ("float8_e5m2",)

    both = combine(OneKind, SdpaAttention)

    assert both.quantized_kv == ("float8_e5m2",)
    assert combine(GatherAttention, SdpaAttention).quantized_kv == ()
    reason = both.why_unsupported(make_spec(kv_dtype="float8_e4m3fn"))
    assert reason is not None
    assert reason.startswith("prefill: it has no float8_e4m3fn KV cache")
