"""Two attention backends on one KV cache: one for single tokens, one for everything longer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from attrs import evolve, frozen
from torch import Tensor

from quire.interfaces.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchLimits,
    GraphSupport,
    KVLayout,
    why_refused,
)
from quire.interfaces.batch import Batch, GroupBatch
from quire.layers.attention import normalise_and_rotate


@frozen(kw_only=True)
class Part:
    """The `tokens` of a batch that one backend serves, and what it planned for them."""

    backend: AttentionBackend
    tokens: slice
    plan: Any


class CombinedAttention(AttentionBackend):
    """Give sequences with one token to one backend and all others to another.

    A mixed batch is cut in two. Sequences with one token come first, so that each part is a view
    of the batch: the one device operation more is a subtraction from `cu_seqlens_q`. The other
    way, a mixed batch as a whole to the prompts' backend, would let the bits of an answer depend
    on whether some prompt runs beside it, and would lose the faster decode whenever one does. The
    price is two launches a layer where one might do, and a copy of q after the fused form.

    Steps of one token a sequence are the decoding backend's whole, and are what CUDA graphs hold: a
    captured mixed step would be cut for ever where it was cut when it was captured.
    """

    prefill_class: ClassVar[type[AttentionBackend]]
    decode_class: ClassVar[type[AttentionBackend]]

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Answer for both, and for the layout that they must share."""
        for part, kind in (("prefill", cls.prefill_class), ("decode", cls.decode_class)):
            reason = why_refused(kind, spec)
            if reason is not None:
                return f"{part}: {reason}"
        prefill, decode = cls.prefill_class.kv_layout(spec), cls.decode_class.kv_layout(spec)
        if prefill != decode:
            return f"the two share no KV cache: prefill keeps {prefill}, decode keeps {decode}"
        return None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Return the layout of both."""
        return cls.decode_class.kv_layout(spec)

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec, limits: BatchLimits) -> int:
        """Count both."""
        kinds = (cls.prefill_class, cls.decode_class)
        return sum(kind.workspace_bytes(spec, limits) for kind in kinds)

    def __init__(
        self, spec: AttentionSpec, limits: BatchLimits, options: Mapping[str, Any]
    ) -> None:
        """Make both; `options` has those of each under `prefill` and `decode`."""
        super().__init__(spec, limits, options)
        self.prefill = self.prefill_class(spec, limits, options.get("prefill", {}))
        self.decode = self.decode_class(spec, limits, options.get("decode", {}))

    def plan(self, batch: Batch, group: int) -> list[Part]:
        """Let each backend plan for its part of the batch; a part without sequences is none."""
        single, num_seqs = batch.num_single_token_seqs, batch.num_seqs
        everything = slice(0, batch.positions.shape[0])
        if single == num_seqs:
            plan = self.decode.plan(batch, group)
            return [Part(backend=self.decode, tokens=everything, plan=plan)]
        if single == 0:
            plan = self.prefill.plan(batch, group)
            return [Part(backend=self.prefill, tokens=everything, plan=plan)]
        first, rest = slice(0, single), slice(single, everything.stop)
        decode = self.decode.plan(_cut(batch, first, first), group)
        prefill = self.prefill.plan(_cut(batch, slice(single, num_seqs), rest), group)
        return [
            Part(backend=self.decode, tokens=first, plan=decode),
            Part(backend=self.prefill, tokens=rest, plan=prefill),
        ]

    def prepare(self, plan: list[Part]) -> None:
        """Enqueue the device part of each plan."""
        for part in plan:
            part.backend.prepare(part.plan)

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: list[Part]
    ) -> None:
        """Let each backend store its own tokens."""
        for part in plan:
            part.backend.write(layer, k[part.tokens], v[part.tokens], kv_cache, part.plan)

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: list[Part],
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Let each backend fill its own rows of `out` and `lse`."""
        for part in plan:
            own = part.tokens
            part.backend.attend(
                layer,
                q[own],
                k[own],
                v[own],
                kv_cache,
                part.plan,
                out[own],
                None if lse is None else lse[own],
            )

    def rotate_and_write(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        positions: Tensor,
        rotary: Any,
        qk_norm: Any,
        kv_cache: Tensor,
        plan: list[Part],
    ) -> Tensor | None:
        """Use the fused form of those that offer it; None where that is nobody."""
        if len(plan) == 1:
            backend, own = plan[0].backend, plan[0].plan
            return backend.rotate_and_write(layer, qkv, positions, rotary, qk_norm, kv_cache, own)
        if not any(_offers_fused(part.backend) for part in plan):
            return None
        found = []
        for part in plan:
            own, at = qkv[part.tokens], positions[part.tokens]
            q = part.backend.rotate_and_write(layer, own, at, rotary, qk_norm, kv_cache, part.plan)
            if q is None:
                spec = self.spec
                heads = own.view(own.shape[0], -1, spec.head_dim)
                qk, v = heads.split((spec.num_heads + spec.num_kv_heads, spec.num_kv_heads), 1)
                qk = normalise_and_rotate(qk, at, rotary, qk_norm)
                q, k = qk[:, : spec.num_heads], qk[:, spec.num_heads :]
                part.backend.write(layer, k, v, kv_cache, part.plan)
            found.append(q)
        return torch.cat(found)


def combine(
    prefill: type[AttentionBackend], decode: type[AttentionBackend]
) -> type[CombinedAttention]:
    """Return the backend class that serves with both."""
    # Only steps of one token a sequence are one backend's whole.
    graphs = GraphSupport.NONE
    if decode.graph_support is not GraphSupport.NONE:
        graphs = GraphSupport.SINGLE_TOKEN
    return type(
        f"{prefill.__name__}And{decode.__name__}",
        (CombinedAttention,),
        {
            "prefill_class": prefill,
            "decode_class": decode,
            "graph_support": graphs,
            # A token's bits would tell whether it was part of a prompt.
            "batch_invariant": prefill is decode and prefill.batch_invariant,
            "quantized_kv": tuple(x for x in prefill.quantized_kv if x in decode.quantized_kv),
        },
    )


def _offers_fused(backend: AttentionBackend) -> bool:
    return type(backend).rotate_and_write is not AttentionBackend.rotate_and_write


def _cut(batch: Batch, seqs: slice, tokens: slice) -> Batch:
    """Return some sequences of a batch, with their tokens.

    `logit_rows` belong to the whole step and are left out, which no backend needs.
    """
    ends = batch.cu_seqlens_q[seqs.start : seqs.stop + 1]
    query_lens = batch.query_lens[seqs]
    groups = tuple(
        GroupBatch(block_table=own.block_table[seqs], slot_mapping=own.slot_mapping[tokens])
        for own in batch.groups
    )
    return evolve(
        batch,
        token_ids=batch.token_ids[tokens],
        positions=batch.positions[tokens],
        cu_seqlens_q=ends - tokens.start if tokens.start else ends,
        seq_lens=batch.seq_lens[seqs],
        logit_rows=batch.logit_rows[:0],
        rows=batch.rows[seqs],
        groups=groups,
        query_lens=query_lens,
        seq_lens_bound=batch.seq_lens_bound[seqs],
        num_single_token_seqs=query_lens.count(1),
        padded_to=len(query_lens),
        plans=[],
    )
