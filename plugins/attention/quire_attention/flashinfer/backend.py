"""Attention by flashinfer's kernels: decodes and prompts are two plans of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from attrs import define
from torch import Tensor

from quire.errors import BuildError, ConfigError, KernelError
from quire.interfaces.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchLimits,
    GraphSupport,
    KVLayout,
)
from quire.interfaces.batch import Batch
from quire_attention.flashinfer import library, xqa
from quire_attention.flashinfer.library import VARIANTS, Variant
from quire_attention.flashinfer.paged import PagedAttention, PageMemory, Part
from quire_attention.flashinfer.pages import partial_bytes, schedule_bytes
from quire_kernels import head_token_kv

# For the memory budget, which is made before the device is asked: no GPU today has more.
MAX_SMS = 192
LARGEST_GROUP = 64
LN_2 = math.log(2)


@define(kw_only=True)
class FlashInferPlan:
    """What the layers of a step share: the planned parts, or rows for XQA before them.

    `batch` and `group` are what was planned for: a log-sum-exp, which XQA does not give, is
    another kernel's work. `parts` is None until `prepare`, since the library's plans of two steps
    would lie in the same memory; captured steps have theirs at once.
    """

    batch: Batch
    group: int
    num_single: int
    slots: Tensor
    parts: tuple[Part, ...] | None = None
    xqa_rows: xqa.XqaRows | None = None


class FlashInferAttention(AttentionBackend):
    """Serve causal attention in bfloat16 and float16, as far as modules are built."""

    graph_support = GraphSupport.SINGLE_TOKEN

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Refuse what the modules cannot express, and what is not among those that were built."""
        group = spec.num_heads // spec.num_kv_heads
        variant = variant_of(spec)
        reasons = {
            "latent attention": spec.latent is not None,
            "ALiBi": spec.alibi,
            "bidirectional attention": not spec.causal,
            "batch invariance": spec.batch_invariant,
            "KV cache in another dtype than the model's; its kernels read a NaN of 8 bits as a "
            "number": spec.kv_dtype != spec.dtype,
            "values of another width than keys": spec.value_head_dim != spec.head_dim,
            f"{group} query heads a KV head, at most {LARGEST_GROUP}": group > LARGEST_GROUP,
            "scale of zero or less": spec.scale <= 0,
            f"module for {variant.name}, only for {_listed(VARIANTS)}": variant not in VARIANTS,
        }
        missing = [name for name, needed in reasons.items() if needed]
        if missing:
            return f"it has no {', no '.join(missing)}"
        if torch.device(spec.device).type != "cuda":
            return f"it runs on an NVIDIA GPU, not on {spec.device!r}"
        built = library.built_variants()
        if built and variant.name not in built:
            return f"its module for {variant.name} is not built; run `quire build flashinfer`"
        return None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Return [num_kv_heads, block_size, head_dim + value_head_dim]: key, then value.

        The layout of `triton` and `cuda`; the kernels take its strides.
        """
        shape = (spec.num_kv_heads, spec.block_size, spec.head_dim + spec.value_head_dim)
        return KVLayout(name=head_token_kv.NAME, block_shape=shape, dtype=spec.kv_dtype)

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec, limits: BatchLimits) -> int:
        """Count partial results, and for decodes and for prompts a schedule and lists of pages."""
        lists = 4 * PageMemory.num_entries(spec, limits)
        arrived = 4 * limits.max_num_seqs * spec.num_heads
        plans = 2 * (schedule_bytes(spec, limits, MAX_SMS) + lists)
        return _partial_bytes(spec, limits, MAX_SMS) + plans + arrived

    def __init__(
        self, spec: AttentionSpec, limits: BatchLimits, options: Mapping[str, Any]
    ) -> None:
        super().__init__(spec, limits, options)
        device = torch.device(spec.device)
        capability = torch.cuda.get_device_capability(device)
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        num_bytes = _partial_bytes(spec, limits, num_sms)
        partial = torch.empty(num_bytes, dtype=torch.uint8, device=device)

        def kernel(name: str, *, causal: bool) -> PagedAttention:
            module = _loaded(name, variant_of(spec))
            return PagedAttention(
                module,
                spec,
                limits,
                kernel=name,
                causal=causal,
                partial=partial,
                num_sms=num_sms,
            )

        # A sequence's only new token sees all of its keys.
        self._decode = kernel("fa2", causal=False)
        self._prefill = kernel(variant_of(spec).kernels(capability)[-1], causal=True)
        self._xqa = None
        if options.get("decode", "auto") == "xqa":
            reason = xqa.why_unsupported(spec, capability)
            if reason is not None:
                raise ConfigError(
                    f"attention option flashinfer.decode=xqa cannot serve this model: {reason}. "
                    f"Leave it out, or set it to paged."
                )
            self._xqa = xqa.XqaAttention(spec, limits, partial)

    def plan(self, batch: Batch, group: int) -> FlashInferPlan:
        """Plan the sequences with one token, then those with several.

        A captured step has the former alone, and padding rows.
        """
        tables, single = batch.groups[group], batch.num_single_token_seqs
        is_captured = batch.captured_for is not GraphSupport.NONE
        if is_captured:
            single = batch.seq_lens.shape[0]
        rows = None
        if single and self._xqa is not None:
            rows = xqa.XqaRows(
                block_table=tables.block_table[:single],
                seq_lens=batch.seq_lens[:single],
                is_padded=is_captured,
            )
        plan = FlashInferPlan(
            batch=batch,
            group=group,
            num_single=single,
            slots=tables.slot_mapping,
            xqa_rows=rows,
        )
        if is_captured:
            plan.parts = self._parts(plan)
        return plan

    def prepare(self, plan: FlashInferPlan) -> None:
        """Let the library plan, which enqueues copies to its memory."""
        if plan.parts is None:
            plan.parts = self._parts(plan)

    def _parts(self, plan: FlashInferPlan) -> tuple[Part, ...]:
        batch, group, single = plan.batch, plan.group, plan.num_single
        parts = []
        if single and plan.xqa_rows is None:
            parts.append(self._decode.plan(batch, group, first=0, end=single))
        if single < batch.num_seqs:
            parts.append(self._prefill.plan(batch, group, first=single, end=batch.num_seqs))
        return tuple(parts)

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: FlashInferPlan
    ) -> None:
        """Store each token's key and value in its slot."""
        head_token_kv.write(layer, k, v, kv_cache, plan.slots)

    def rotate_and_write(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        positions: Tensor,
        rotary: Any,
        qk_norm: Any,
        kv_cache: Tensor,
        plan: FlashInferPlan,
    ) -> Tensor | None:
        """Normalise, rotate and write in one kernel."""
        return head_token_kv.rotate_and_write(
            layer, qkv, positions, rotary, qk_norm, kv_cache, plan.slots
        )

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: FlashInferPlan,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Attend part after part; sinks are put into the result by its log-sum-exp."""
        if kv_cache is None:
            raise KernelError(
                "attention backend 'flashinfer' needs a KV cache, and the model runs without one; "
                "choose another with --attention-backend."
            )
        q = q if q.stride(-1) == 1 else q.contiguous()
        whole = out if out.is_contiguous() else out.new_empty(out.shape)
        parts = plan.parts
        assert parts is not None, "a step is prepared before its layers"
        if plan.xqa_rows is not None and lse is None:
            rows = slice(len(plan.xqa_rows.seq_lens))
            self._attend_unplanned(layer, plan.xqa_rows, q[rows], kv_cache, whole[rows])
        elif plan.xqa_rows is not None:
            parts = (self._planned_decode(plan), *parts)
        for part in parts:
            self._attend_part(layer, part, q, kv_cache, whole, lse)
        if whole is not out:
            out.copy_(whole)

    def _attend_unplanned(
        self, layer: AttentionLayer, rows: xqa.XqaRows, q: Tensor, kv_cache: Tensor, out: Tensor
    ) -> None:
        assert self._xqa is not None
        self._xqa.run(layer, rows, q, kv_cache, out)

    def _planned_decode(self, plan: FlashInferPlan) -> Part:
        """Plan the rows of XQA for the other kernel, which gives a log-sum-exp."""
        batch = plan.batch
        if batch.captured_for is not GraphSupport.NONE:
            raise KernelError(
                "attention backend 'flashinfer' with decode=xqa gives no log-sum-exp in a CUDA "
                "graph; leave the option out."
            )
        return self._decode.plan(batch, plan.group, first=0, end=batch.num_single_token_seqs)

    def _attend_part(
        self,
        layer: AttentionLayer,
        part: Part,
        q: Tensor,
        kv_cache: Tensor,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        sinks = layer.sinks
        if sinks is None and lse is None:
            part.run(q, kv_cache, out, None)
            return
        sums = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
        part.run(q, kv_cache, out, sums)
        rows = slice(part.first_token, part.first_token + part.num_tokens)
        found = sums[rows] * LN_2
        if sinks is not None:
            found = add_sinks(out[rows], found, sinks)
        if lse is not None:
            lse[rows] = found


def variant_of(spec: AttentionSpec) -> Variant:
    """Return the module that a spec needs."""
    return Variant(
        dtype=spec.dtype,
        head_dim=spec.head_dim,
        window=spec.sliding_window is not None,
        softcap=spec.logit_softcap is not None,
    )


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Let the sinks take their share of `out` [tokens, heads, dim]; return the log-sum-exp.

    `lse` [tokens, heads] is without the sinks [heads], which are scores of keys without values.
    """
    out *= torch.sigmoid(lse - sinks).unsqueeze(-1)
    return torch.logaddexp(lse, sinks.expand_as(lse))


def _listed(variants: tuple[Variant, ...]) -> str:
    return ", ".join(variant.name for variant in variants)


def _partial_bytes(spec: AttentionSpec, limits: BatchLimits, num_sms: int) -> int:
    return max(partial_bytes(spec, limits, num_sms), xqa.SCRATCH_BYTES)


def _loaded(kernel: str, variant: Variant) -> Any:
    """Return the library's module, compiled where it is not there. Raises: BuildError."""
    from flashinfer.prefill import get_batch_prefill_module

    try:
        return get_batch_prefill_module(kernel, *library.module_arguments(variant))
    except (OSError, RuntimeError) as error:
        raise BuildError(
            f"flashinfer's module for {variant.name} cannot be loaded: {error}. "
            f"Run `quire build flashinfer`."
        ) from error
