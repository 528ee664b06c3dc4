"""The queries, keys and values of the self-check's sequences, drawn on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from quire.execution.self_check_case import windowed_sequence
from quire.execution.synthetic_batch import Span
from quire.interfaces.attention import AttentionSpec
from quire.layers.attention import Attention, QKNorm, normalise_and_rotate
from quire.layers.quantized_cache import as_stored
from quire.layers.rotary import RotaryTable

# Tokens that are drawn; longer sequences repeat them.
POOL = 256
# Keys around the beginning of a window score +EDGE_SCORE, the thousands behind them -EDGE_SCORE:
# one too many or too few is seen, and there is no long sum, whose rounding differs between right
# kernels by more than the bound.
EDGE_KEYS, EDGE_SCORE = 8, 12.0
Heads = tuple[Tensor, Tensor, Tensor]


class Drawn(Protocol):
    """What a batch writes, and what attention over it is judged by."""

    def packed(self, spans: Sequence[Span]) -> Tensor:
        """Return q, k and v of a batch in one tensor [num_tokens, width] of the model's dtype."""
        ...

    def exact(self, span: Span) -> Heads:
        """Return the span's queries, and the keys and values that they may see, as they are."""
        ...

    def plain(self, span: Span) -> Heads:
        """Return the same as plain PyTorch has them in the model's dtype."""
        ...


class Sequences:
    """Heads that `write` and `attend` are given as they are."""

    def __init__(self, layer: Attention, spec: AttentionSpec, lengths: Sequence[int]) -> None:
        self._layer, self._spec = layer, spec
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, spec.dtype)

        def draw(*shape: int) -> Tensor:
            return torch.randn(POOL, *shape, generator=generator).to(dtype)

        self._queries = 2 * draw(spec.num_heads, spec.head_dim)
        keys = draw(spec.num_kv_heads, spec.head_dim)
        values = draw(spec.num_kv_heads, spec.value_head_dim)
        places = [(torch.arange(n) + 29 * i) % POOL for i, n in enumerate(lengths)]
        self._keys = [keys[place] for place in places]
        self._values = [values[place] for place in places]
        self._windowed = windowed_sequence(spec)
        if self._windowed is not None:
            self._keys[self._windowed] = self._with_edge(self._keys[self._windowed])
        if spec.latent is not None:
            self._values = [keys[..., : spec.value_head_dim] for keys in self._keys]

    def _with_edge(self, keys: Tensor) -> Tensor:
        """Return keys that score high in every head at the beginning, and low behind it."""
        spec, queries = self._spec, self._queries[0].double()
        # [num_kv_heads, head_dim, heads that share one]: of unit score in each of these.
        unit = torch.linalg.pinv(queries.unflatten(0, (spec.num_kv_heads, -1)) * spec.scale)
        shift = (unit.sum(-1) * EDGE_SCORE).to(keys.dtype)
        keys = keys / 4 - shift
        keys[:EDGE_KEYS] += 2 * shift
        return keys

    def packed(self, spans: Sequence[Span]) -> Tensor:
        """Return the heads of a batch side by side."""
        parts = [
            torch.cat(
                (
                    self._q(span).flatten(1),
                    self._keys[span.sequence][span.first : span.last].flatten(1),
                    self._values[span.sequence][span.first : span.last].flatten(1),
                ),
                dim=1,
            )
            for span in spans
        ]
        return torch.cat(parts)

    def _q(self, span: Span) -> Tensor:
        """Return the queries of a span; those of the windowed sequence are all the same."""
        if span.sequence == self._windowed:
            return self._queries[:1].expand(span.num_tokens, -1, -1)
        places = torch.arange(span.first, span.last) * 7 + 13 * span.sequence
        return self._queries[places % POOL]

    def exact(self, span: Span) -> Heads:
        """Return what is seen, keys and values as the cache has them."""
        seen = _seen(span, self._spec)
        k, v = self._keys[span.sequence][seen], self._values[span.sequence][seen]
        return self._q(span), *_as_stored(self._layer, self._spec, k, v)

    plain = exact


class RawSequences:
    """Heads that are still to be normed and rotated, by the layer's own weights and angles."""

    def __init__(self, layer: Attention, spec: AttentionSpec, lengths: Sequence[int]) -> None:
        self._layer, self._spec = layer, spec
        generator = torch.Generator().manual_seed(3)
        dtype, split = getattr(torch, spec.dtype), spec.num_heads + spec.num_kv_heads
        shape = (split + spec.num_kv_heads, spec.head_dim)
        self._raw = [torch.randn(n, *shape, generator=generator).to(dtype) for n in lengths]
        norm, rotary = _norm_on_cpu(layer), _rotary_on_cpu(layer, max(lengths), dtype)
        self._plain, self._exact = [], []
        for raw in self._raw:
            qk, positions = raw[:, :split], torch.arange(len(raw))
            self._plain.append(normalise_and_rotate(qk, positions, rotary, norm))
            self._exact.append(_exactly(qk, rotary, norm))

    def packed(self, spans: Sequence[Span]) -> Tensor:
        """Return the raw heads of a batch."""
        parts = [self._raw[span.sequence][span.first : span.last] for span in spans]
        return torch.cat(parts).flatten(1)

    def exact(self, span: Span) -> Heads:
        """Return heads that were normed and rotated in float64, and never stored."""
        return self._heads(span, self._exact[span.sequence])

    def plain(self, span: Span) -> Heads:
        """Return heads as the core's own steps make them."""
        q, k, v = self._heads(span, self._plain[span.sequence])
        return q, *_as_stored(self._layer, self._spec, k, v)

    def _heads(self, span: Span, qk: Tensor) -> Heads:
        seen, num_heads = _seen(span, self._spec), self._spec.num_heads
        v = self._raw[span.sequence][seen, qk.shape[1] :]
        return qk[span.first : span.last, :num_heads], qk[seen, num_heads:], v


def _as_stored(
    layer: Attention, spec: AttentionSpec, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return keys and values as the cache gives them back."""
    dtype, scales = getattr(torch, spec.kv_dtype), (layer.k_scale, layer.v_scale)
    on_cpu = [None if scale is None else scale.cpu() for scale in scales]
    return as_stored(k, on_cpu[0], dtype), as_stored(v, on_cpu[1], dtype)


def _seen(span: Span, spec: AttentionSpec) -> slice:
    window = spec.sliding_window
    return slice(0 if window is None else max(0, span.first - window + 1), span.last)


def _norm_on_cpu(layer: Attention) -> QKNorm | None:
    norm = layer.qk_norm
    if norm is None:
        return None
    return QKNorm(norm.q.cpu(), norm.k.cpu(), norm.eps, (layer.num_heads, layer.num_kv_heads))


def _rotary_on_cpu(layer: Attention, longest: int, dtype: torch.dtype) -> RotaryTable | None:
    table = layer.rotary
    if table is None:
        return None
    cos, sin = table.cos[:longest].cpu(), table.sin[:longest].cpu()
    return RotaryTable(cos, sin, table.head_dim, dtype)


def _exactly(qk: Tensor, rotary: RotaryTable | None, norm: QKNorm | None) -> Tensor:
    """Return [num_tokens, heads, head_dim] in float64; cosines are those of the model's dtype."""
    x = qk.double()
    if norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weights.double()
    if rotary is None:
        return x
    cos, sin = (table[: len(x), None].to(qk.dtype).double() for table in (rotary.cos, rotary.sin))
    half = rotary.rotary_dim // 2
    first, second, rest = x.split((half, half, rotary.head_dim - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
