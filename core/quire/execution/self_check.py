"""Before an engine serves: its attention backend against float64 on a small case of its spec.

The oracle is the formula of `quire.layers.dense_attention`, not the reference plugin, so that the
check also judges that one and needs no plugin to be there. docs/decisions/0007 says more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from quire.errors import KernelError
from quire.execution.kv_cache import LayerGroup
from quire.execution.self_check_case import (
    fused_steps_of,
    lengths_of,
    pieces_of,
    steps_of,
    whole_steps_of,
)
from quire.execution.self_check_heads import Drawn, Heads, RawSequences, Sequences
from quire.execution.self_check_latents import DrawnLatents
from quire.execution.synthetic_batch import Span, batch_of, block_tables
from quire.interfaces.attention import QUANTIZED_KV_DTYPES, AttentionSpec, BatchLimits
from quire.interfaces.batch import Batch, GroupBatch
from quire.layers.attention import normalise_and_rotate
from quire.layers.dense_attention import dense_products, dense_sums
from quire.patience import Wait, telling

PLAIN_DTYPES = ("float32", "bfloat16", "float16")
# What lies in slots that nobody has written: read and not masked, it outweighs all else.
UNWRITTEN = 100.0
# So many orders of the head dimensions are tried before an error counts as beyond the bound:
# plain PyTorch may come out better than its dtype promises by luck.
ORDERS = 16


def why_skipped(spec: AttentionSpec) -> str | None:
    """Return why layers of a spec are not checked; None where they are."""
    if spec.kv_dtype not in (*PLAIN_DTYPES, *QUANTIZED_KV_DTYPES):
        return f"the check has no {spec.kv_dtype} KV cache"
    return None


def foretell(groups: Sequence[LayerGroup], *, skip: bool) -> list[str]:
    """Return a line a group: that its backend is checked at the start, or why it is not."""
    lines = []
    for group in groups:
        reason = "--skip-self-check" if skip else why_skipped(group.spec)
        window = group.spec.sliding_window
        layers = f"{len(group.layers)} layer{'s' if len(group.layers) > 1 else ''}"
        layers += "" if window is None else f", window {window}"
        verdict = "against float64 at the start" if reason is None else f"skipped: {reason}"
        lines.append(f"attention {group.backend_name} ({layers}): {verdict}")
    return lines


@torch.inference_mode()
def check_attention(groups: Sequence[LayerGroup], limits: BatchLimits) -> None:
    """Check the backend that is bound to each group's layers.

    Raises: KernelError naming the backend, and the worst element or the method that raised.
    """
    for number, group in enumerate(groups):
        if why_skipped(group.spec) is not None:
            continue
        with telling() as wait:
            steps = steps_of(group.spec, limits) if group.has_cache else whole_steps_of(limits)
            _Check(group, number, limits, steps, wait).run()
            if group.spec.latent is not None:
                _LatentCheck(group, number, limits, fused_steps_of(limits), wait).run()
            if group.has_cache and group.layers[0].has_fused_write:
                _FusedCheck(group, number, limits, fused_steps_of(limits), wait).run()


class _Check:
    """The check of one group's backend, in a cache of its own: plan, prepare, write, attend.

    An encoder has no cache, and its sequences are computed whole.
    """

    def __init__(
        self,
        group: LayerGroup,
        number: int,
        limits: BatchLimits,
        steps: list[list[Span]],
        wait: Wait,
    ) -> None:
        self.wait = wait
        self.spec, self.number, self.limits, self.steps = group.spec, number, limits, steps
        self.layer = group.layers[0]
        self.name, self.backend = group.backend_name, self.layer.backend
        lengths = lengths_of(steps)
        self.written = [0] * len(lengths)
        self.heads = self._drawn(lengths)
        self.tables, num_blocks = block_tables(lengths, self.spec.block_size)
        shape = (num_blocks, *group.layout.block_shape)
        dtype = getattr(torch, group.layout.dtype)
        self.cache: Tensor | None = None
        if group.has_cache:
            self.cache = torch.full(shape, UNWRITTEN, dtype=dtype, device=self.spec.device)

    def run(self) -> None:
        """Write each step's past, run it and judge what comes out."""
        for step in self.steps:
            past = [Span(s.sequence, self.written[s.sequence], s.first) for s in step]
            for piece in pieces_of([span for span in past if span.num_tokens > 0], self.limits):
                self._write(piece)
                if self.cache is not None and self.cache.is_cuda:
                    # A plan may write its staging again only when the last step with it has ended.
                    torch.cuda.synchronize(self.cache.device)
            self._judge(step, self._attended(step))

    def _drawn(self, lengths: Sequence[int]) -> Drawn:
        return Sequences(self.layer, self.spec, lengths)

    def _write(self, spans: Sequence[Span]) -> tuple[Any, Heads]:
        """Plan for a batch and write its keys and values; return the plan and q, k, v."""
        batch = _of_last_group(batch_of(spans, self.tables, self.spec, self.number))
        plan = self._call(spans, self.backend.plan, batch, self.number)
        batch.plans = [plan] * (self.number + 1)
        self._call(spans, self.backend.prepare, plan)
        heads = self._write_heads(spans, self.heads.packed(spans), batch, plan)
        for span in spans:
            self.written[span.sequence] = span.last
        return plan, heads

    def _write_heads(self, spans: Sequence[Span], packed: Tensor, batch: Batch, plan: Any) -> Heads:
        """Write `packed`: q, k and v of a batch in one tensor, of which the model's are cut too."""
        spec = self.spec
        widths = (
            spec.num_heads * spec.head_dim,
            spec.num_kv_heads * spec.head_dim,
            spec.num_kv_heads * spec.value_head_dim,
        )
        q, k, v = packed.to(spec.device).split(widths, dim=1)
        q = q.unflatten(1, (spec.num_heads, spec.head_dim))
        k = k.unflatten(1, (spec.num_kv_heads, spec.head_dim))
        v = v.unflatten(1, (spec.num_kv_heads, spec.value_head_dim))
        if spec.latent is not None:
            v = k[..., : spec.value_head_dim]
        if self.cache is not None:
            self._call(spans, self.backend.write, self.layer, k, v, self.cache, plan)
        return q, k, v

    def _attended(self, step: Sequence[Span]) -> Tensor:
        """Return what the backend gives for a step, on the CPU."""
        plan, (q, k, v) = self._write(step)
        shape = (len(q), self.spec.num_heads, self.spec.value_head_dim)
        out = q.new_full(shape, float("nan"))
        arguments = (self.layer, q, k, v, self.cache, plan, out)
        self._call(step, self.backend.attend, *arguments)
        if out.shape != shape or out.dtype != q.dtype:
            raise self._error(
                f"made `out` {list(out.shape)} of {out.dtype}, where {list(shape)} of {q.dtype} "
                f"was given, for {_in_words(step)}"
            )
        return out.cpu()

    def _call(self, spans: Sequence[Span], method: Callable[..., Any], *arguments: Any) -> Any:
        self.wait.words = (
            f"the self-check of attention backend {self.name!r}, in {method.__name__}() for "
            f"{_in_words(spans)}: --skip-self-check starts without it"
        )
        try:
            return method(*arguments)
        except torch.cuda.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            raise self._error(
                f"raises {type(error).__name__} in {method.__name__}() for {_in_words(spans)}: "
                f"{text}"
            ) from error

    def _judge(self, step: Sequence[Span], out: Tensor) -> None:
        """Allow twice the error of plain PyTorch, plus one rounding unit of the dtype."""
        exact = torch.cat([self._dense(self.heads.exact(s), torch.float64) for s in step])
        difference = (out.double() - exact).abs().nan_to_num(float("inf"))
        numbers = torch.finfo(out.dtype)
        unit = numbers.eps * max(exact.abs().max().item(), numbers.smallest_normal)
        error, bound = difference.max().item(), unit
        plain = [self.heads.plain(span) for span in step]
        for number, (order, in_turn) in enumerate(self._ways()):
            # Plain PyTorch is looked at as closely as the verdict needs, with the scale after the
            # product and before it.
            if error <= bound or (number > 1 and error > 4 * bound):
                break
            spec = self.spec if number % 2 == 0 else evolve(self.spec, scale=1.0)
            factor = self.spec.scale / spec.scale
            found = [
                self._dense((q[..., order] * factor, k[..., order], v), out.dtype, spec, in_turn)
                for q, k, v in plain
            ]
            bound = max(bound, unit + 2 * (torch.cat(found).double() - exact).abs().max().item())
        if error > bound:
            raise self._error(_worst(step, out, exact, bound))

    def _ways(self) -> list[tuple[Tensor, bool]]:
        """Return orders of the head dimensions, and whether they are added up one by one.

        Both change rounding and nothing else; kernels add one by one, PyTorch does not.
        """
        generator, dim = torch.Generator().manual_seed(2), self.spec.head_dim
        drawn = [torch.randperm(dim, generator=generator) for _ in range(ORDERS - 1)]
        orders = enumerate([torch.arange(dim), *drawn])
        return [(order, number % 4 in (1, 2)) for number, order in orders]

    def _dense(
        self,
        heads: Heads,
        dtype: torch.dtype,
        spec: AttentionSpec | None = None,
        in_turn: bool = False,
    ) -> Tensor:
        spec, (q, k, v) = spec or self.spec, heads
        sinks, slopes = self.layer.sinks, self.layer.alibi_slopes
        return dense_sums(
            spec,
            dense_products(spec, q, k, dtype=dtype, in_turn=in_turn),
            v,
            sinks=None if sinks is None else sinks.cpu(),
            alibi_slopes=None if slopes is None else slopes.cpu(),
        )

    def _error(self, fact: str) -> KernelError:
        spec = self.spec
        window = "" if spec.sliding_window is None else f", window {spec.sliding_window}"
        return KernelError(
            f"attention backend {self.name!r} fails the self-check: it {fact} ({spec.num_heads} "
            f"heads over {spec.num_kv_heads} of {spec.head_dim}, {spec.dtype}, blocks of "
            f"{spec.block_size}{window}). Ask for another with --attention-backend; `quire plugins "
            f"check` says more of this one, --skip-self-check starts regardless."
        )


class _FusedCheck(_Check):
    """The same through `rotate_and_write`, with the layer's own norm and rotation."""

    def _drawn(self, lengths: Sequence[int]) -> Drawn:
        return RawSequences(self.layer, self.spec, lengths)

    def _write_heads(self, spans: Sequence[Span], packed: Tensor, batch: Batch, plan: Any) -> Heads:
        spec, layer = self.spec, self.layer
        qkv = packed.to(spec.device)
        positions, split = batch.positions, spec.num_heads + spec.num_kv_heads
        heads = qkv.clone().unflatten(1, (-1, spec.head_dim))
        arguments = (layer, qkv, positions, layer.rotary, layer.qk_norm, self.cache, plan)
        q = self._call(spans, self.backend.rotate_and_write, *arguments)
        k, v = heads[:, spec.num_heads : split], heads[:, split:]
        if q is None:
            qk = normalise_and_rotate(heads[:, :split], positions, layer.rotary, layer.qk_norm)
            q, k = qk[:, : spec.num_heads], qk[:, spec.num_heads :]
            self._call(spans, self.backend.write, layer, k, v, self.cache, plan)
        wanted = (len(qkv), spec.num_heads, spec.head_dim)
        if q.shape != wanted or q.dtype != qkv.dtype:
            raise self._error(
                f"returns q {list(q.shape)} of {q.dtype} from rotate_and_write(), where "
                f"{list(wanted)} of {qkv.dtype} is wanted, for {_in_words(spans)}"
            )
        return q, k, v


class _LatentCheck(_Check):
    """What `rotate_and_write_latents` makes, by the layer's own norm and rotation."""

    def run(self) -> None:
        """Judge queries and keys, and what was written."""
        for step in self.steps:
            batch = _of_last_group(batch_of(step, self.tables, self.spec, self.number))
            plan = self._call(step, self.backend.plan, batch, self.number)
            self._call(step, self.backend.prepare, plan)
            drawn = DrawnLatents(self.layer, len(batch.positions))
            arguments = (drawn.projected, batch.positions, self.layer.rotary, drawn.norm)
            method = self.backend.rotate_and_write_latents
            found = self._call(step, method, self.layer, *arguments, self.cache, plan)
            if found is None:
                return
            (queries, keys), slots = found, batch.groups[-1].slot_mapping.long()
            assert self.cache is not None
            written = self.cache.flatten(0, 1)[slots]
            fact = drawn.what_is_wrong(queries, keys, written, batch.positions)
            if fact is not None:
                raise self._error(f"{fact} from rotate_and_write_latents() for {_in_words(step)}")


def _of_last_group(batch: Batch) -> Batch:
    """Return a batch whose groups before the last one say nothing of it."""
    own = batch.groups[-1]
    table, slots = torch.zeros_like(own.block_table), torch.zeros_like(own.slot_mapping)
    other = GroupBatch(block_table=table, slot_mapping=slots)
    return evolve(batch, groups=(*[other] * (len(batch.groups) - 1), own))


def _in_words(spans: Sequence[Span]) -> str:
    tokens = ", ".join(f"{span.num_tokens} after {span.first}" for span in spans)
    return f"sequences of new tokens {tokens}"


def _worst(step: Sequence[Span], out: Tensor, exact: Tensor, bound: float) -> str:
    """Say where the error is largest; a NaN is the worst of all."""
    difference = (out.double() - exact).abs().nan_to_num(float("inf"))
    token, head, dim = torch.unravel_index(difference.argmax(), difference.shape)
    row, span = int(token), step[0]
    for span in step:
        if row < span.num_tokens:
            break
        row -= span.num_tokens
    got, expected = out[token, head, dim].item(), exact[token, head, dim].item()
    wrong = int((difference > bound).any(-1).sum())
    cause = " (left unwritten, or computed from NaN)" if math.isnan(got) else ""
    return (
        f"is wrong at sequence {step.index(span)} of {len(step)} ({span.num_tokens} new tokens "
        f"after {span.first}), position {span.first + row}, head {int(head)}, dimension "
        f"{int(dim)}: got {got:.6g}{cause}, expected {expected:.6g}, bound {bound:.3g}; {wrong} of "
        f"{difference.shape[0] * difference.shape[1]} (token, head) pairs are wrong"
    )
