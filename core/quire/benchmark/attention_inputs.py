"""One step's inputs for any backend: the same numbers, in each one's own layout of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor

from quire.benchmark.attention_shapes import Shape
from quire.errors import KernelError
from quire.execution.kv_cache import layout_of
from quire.execution.synthetic_batch import Span, batch_of, block_tables
from quire.interfaces.attention import AttentionBackend, AttentionSpec, BatchLimits
from quire.interfaces.batch import Batch

# So many tokens are written to the cache at a time.
WRITTEN_AT_ONCE = 8192
# Steps of a few kilobytes have no more copies, and may find theirs in a cache.
MOST_COPIES = 256
# Of normal numbers few are larger.
LARGEST_DRAWN = 8.0


@frozen
class Layer:
    """What a backend may read of a layer."""

    index: int = 0
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None


@define(kw_only=True)
class Inputs:
    """Queries of the step end to end; keys and values of each sequence from its first token.

    `layer` has scales where the cache is quantized, another one a head.
    """

    shape: Shape
    spec: AttentionSpec
    q: Tensor
    k: list[Tensor]
    v: list[Tensor]
    layer: Layer

    @classmethod
    def draw(cls, shape: Shape, spec: AttentionSpec, seed: int) -> Inputs:
        """Draw normal numbers on the device."""
        device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)
        generator = torch.Generator(device).manual_seed(seed)

        def normal(num_tokens: int, heads: int, dim: int) -> Tensor:
            size = (num_tokens, heads, dim)
            return torch.randn(size, generator=generator, dtype=dtype, device=device)

        return cls(
            shape=shape,
            spec=spec,
            q=normal(shape.num_tokens, spec.num_heads, spec.head_dim),
            k=[normal(n, spec.num_kv_heads, spec.head_dim) for _, n in shape.rows],
            v=[normal(n, spec.num_kv_heads, spec.value_head_dim) for _, n in shape.rows],
            layer=_layer(spec),
        )

    def limits(self) -> BatchLimits:
        """Return what a backend must be ready for."""
        return BatchLimits(
            max_num_seqs=len(self.shape.rows),
            max_num_batched_tokens=max(self.shape.num_tokens, WRITTEN_AT_ONCE),
            max_model_len=self.shape.longest,
        )


def _layer(spec: AttentionSpec) -> Layer:
    if not spec.has_quantized_kv:
        return Layer()
    largest = torch.finfo(getattr(torch, spec.kv_dtype)).max
    steps = torch.linspace(0.5, 1.0, spec.num_kv_heads, device=spec.device)
    return Layer(
        k_scale=steps * LARGEST_DRAWN / largest, v_scale=steps.flip(0) * LARGEST_DRAWN / largest
    )


class Workload:
    """A backend with a filled cache, and copies of what it reads and writes to go round."""

    def __init__(
        self, backend: type[AttentionBackend], options: dict[str, Any], inputs: Inputs
    ) -> None:
        """Make the backend and fill its cache with its own `write`."""
        self.inputs, spec = inputs, inputs.spec
        self.backend = backend(spec, inputs.limits(), options)
        lengths = [length for _, length in inputs.shape.rows]
        self._tables, num_blocks = block_tables(lengths, spec.block_size)
        layout = layout_of(backend.__name__, backend, spec)
        shape, dtype = (num_blocks, *layout.block_shape), getattr(torch, layout.dtype)
        self._caches = [torch.zeros(shape, dtype=dtype, device=spec.device)]
        self._q = [inputs.q]
        out = (*inputs.q.shape[:2], spec.value_head_dim)
        self._out = [inputs.q.new_full(out, float("nan"))]
        self._fill()
        spans = [
            Span(i, length - query_len, length)
            for i, (query_len, length) in enumerate(inputs.shape.rows)
        ]
        self.batch = self._batch(spans)
        self._k, self._v = self._step_tensors(spans)
        self.plan()

    def _batch(self, spans: Sequence[Span]) -> Batch:
        return batch_of(spans, self._tables, self.inputs.spec, 0)

    def _step_tensors(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        k = [self.inputs.k[span.sequence][span.first : span.last] for span in spans]
        v = [self.inputs.v[span.sequence][span.first : span.last] for span in spans]
        return torch.cat(k), torch.cat(v)

    def _fill(self) -> None:
        most = self.inputs.limits().max_num_batched_tokens
        batches: list[list[Span]] = [[]]
        left = most
        for i, (_, length) in enumerate(self.inputs.shape.rows):
            first = 0
            while first < length:
                last = min(length, first + left)
                batches[-1].append(Span(i, first, last))
                left -= last - first
                first = last
                if left == 0:
                    batches.append([])
                    left = most
        for spans in batches:
            if spans:
                self._write(sorted(spans, key=lambda span: span.num_tokens > 1))

    def _write(self, spans: Sequence[Span]) -> None:
        batch = self._batch(spans)
        plan = self.backend.plan(batch, 0)
        batch.plans = [plan]
        self.backend.prepare(plan)
        k, v = self._step_tensors(spans)
        self.backend.write(self.inputs.layer, k, v, self._caches[0], plan)
        if k.is_cuda:
            # A plan may write its staging again only when the last step with it has ended.
            torch.cuda.synchronize(k.device)

    def plan(self) -> None:
        """Plan the step and enqueue the plan's device part."""
        self._plan = self.backend.plan(self.batch, 0)
        self.batch.plans = [self._plan]
        self.backend.prepare(self._plan)

    @property
    def copy_bytes(self) -> int:
        """Return the bytes of one copy of cache, queries and output."""
        return sum(x[0].nbytes for x in (self._caches, self._q, self._out))

    def make_copies(self, num_bytes: int) -> int:
        """Make copies until they have so many bytes, or are many; return how many there are."""
        count = min(MOST_COPIES, -(-num_bytes // self.copy_bytes))
        while len(self._caches) < count:
            for tensors in (self._caches, self._q, self._out):
                tensors.append(tensors[0].clone())
        return len(self._caches)

    def attend(self, turn: int = 0) -> Tensor:
        """Enqueue the step with the copy whose turn it is; return its output."""
        i = turn % len(self._caches)
        out = self._out[i]
        arguments = (self._k, self._v, self._caches[i], self._plan, out)
        self.backend.attend(self.inputs.layer, self._q[i], *arguments)
        return out

    def attend_once(self) -> Tensor:
        """Enqueue the step and return its output. Raises: KernelError for one of another shape."""
        wanted = tuple(self._out[0].shape)
        out = self.attend()
        if tuple(out.shape) != wanted:
            name = type(self.backend).__name__
            raise KernelError(f"{name} made `out` {list(out.shape)}, given as {list(wanted)}")
        return out
