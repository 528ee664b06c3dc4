"""Attention of a benchmark's step in float64 and in plain PyTorch, some queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from quire.benchmark.attention_inputs import Inputs
from quire.layers.dense_attention import dense_attention
from quire.layers.quantized_cache import as_stored

# Scores in memory at a time: 2 GiB in float64 on a GPU, 128 MiB on a CPU.
MOST_SCORES = {"cpu": 2**24, "cuda": 2**28}
# As in the self-check: plain PyTorch is looked at closer where an error is just beyond the bound.
ORDERS = 8


@frozen(kw_only=True)
class Judgement:
    """The largest error of an output, and what is allowed."""

    error: float
    bound: float

    @property
    def of_bound(self) -> float:
        """Return the error as a multiple of the bound; a NaN is infinitely wrong."""
        return self.error / self.bound


class Truth:
    """What a step must give, and how far from it plain PyTorch in the same dtype is."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._dtype = inputs.q.dtype
        self.exact = torch.cat(list(_pieces(inputs, torch.float64, None)))
        self._unit = torch.finfo(self._dtype).eps * self.exact.abs().max().item()
        self._generator = torch.Generator().manual_seed(0)
        self._plain = 0.0
        self._looked = 0

    def judge(self, out: Tensor) -> Judgement:
        """Allow twice plain PyTorch's error, plus one rounding unit of the dtype."""
        difference = (out.double() - self.exact).abs()
        error = difference.nan_to_num(float("inf")).max().item()
        while self._looked < 1 or (
            self._bound < error <= 4 * self._bound and self._looked < ORDERS
        ):
            self._look()
        return Judgement(error=error, bound=self._bound)

    @property
    def _bound(self) -> float:
        return self._unit + 2 * self._plain

    def _look(self) -> None:
        dim = self._inputs.spec.head_dim
        order = torch.randperm(dim, generator=self._generator).to(self.exact.device)
        first = 0
        for piece in _pieces(self._inputs, self._dtype, order if self._looked else None):
            exact = self.exact[first : first + len(piece)]
            self._plain = max(self._plain, (piece.double() - exact).abs().max().item())
            first += len(piece)
        self._looked += 1


def _stored(inputs: Inputs, number: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of a sequence as the cache gives them back."""
    dtype, layer = getattr(torch, inputs.spec.kv_dtype), inputs.layer
    k, v = inputs.k[number], inputs.v[number]
    return as_stored(k, layer.k_scale, dtype), as_stored(v, layer.v_scale, dtype)


def _pieces(inputs: Inputs, dtype: torch.dtype, order: Tensor | None) -> Iterator[Tensor]:
    """Yield the outputs of all sequences, in order."""
    spec, first = inputs.spec, 0
    most = MOST_SCORES[torch.device(spec.device).type]
    for number, (query_len, length) in enumerate(inputs.shape.rows):
        k, v = _stored(inputs, number)
        q = inputs.q[first : first + query_len]
        first += query_len
        if order is not None:
            q, k = q[..., order], k[..., order]
        at_once = max(1, most // (spec.num_heads * length))
        for begin in range(0, query_len, at_once):
            end = min(begin + at_once, query_len)
            last = length - query_len + end
            window = spec.sliding_window
            seen = slice(0 if window is None else max(0, last - (end - begin) - window + 1), last)
            yield dense_attention(spec, q[begin:end], k[seen], v[seen], dtype=dtype)
