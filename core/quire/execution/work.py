"""What a model has to compute and read, counted from its shapes: what a measurement divides by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen

from quire.execution.kv_cache import LayerGroup
from quire.interfaces.model import Model
from quire.interfaces.quantization import ExpertsSpec
from quire.layers.embedding import Embedding, Head
from quire.layers.experts import Experts
from quire.layers.linear import Linear


@frozen(kw_only=True)
class AttentionWork:
    """Layers that attend alike. `flops_per_pair` is of one query and one key, all layers."""

    flops_per_pair: int
    window: int | None


@frozen(kw_only=True)
class ModelWork:
    """FLOPs of a token's linear layers and of a row of logits; bytes that every step reads.

    Of experts those that serve one token are counted, which a step of several tokens may exceed.
    A product of m x k by k x n counts 2 m k n; norms, RoPE and softmax count nothing.
    """

    linear_flops: int
    head_flops: int
    weight_bytes: int
    attention: tuple[AttentionWork, ...]

    def prefill_flops(self, length: int) -> int:
        """Return the FLOPs of one prompt and the logits of its last token."""
        attention = sum(a.flops_per_pair * _num_pairs(length, a.window) for a in self.attention)
        return length * self.linear_flops + self.head_flops + attention


def work_of(model: Model, groups: Sequence[LayerGroup], weight_bytes: int) -> ModelWork:
    """Count the work of a model; `weight_bytes` are those of all its parameters."""
    layers = list(model.modules())
    linears = [layer.spec for layer in layers if isinstance(layer, Linear)]
    experts = [layer for layer in layers if isinstance(layer, Experts)]
    heads = [layer for layer in layers if isinstance(layer, Head)]
    reads_embedding = any(h.is_tied and h.method.loaded_bytes(h) is None for h in heads)
    # An embedding is looked up in, not read, unless the head uses it too, and no copy of it.
    looked_up = (
        [] if reads_embedding else [layer.spec for layer in layers if isinstance(layer, Embedding)]
    )
    return ModelWork(
        linear_flops=sum(2 * s.in_features * s.out_features for s in linears)
        + sum(2 * e.spec.top_k * _expert_elements(e.spec) for e in experts),
        head_flops=sum(2 * h.spec.num_embeddings * h.spec.embedding_dim for h in heads),
        weight_bytes=weight_bytes
        - sum(s.num_embeddings * s.embedding_dim * _size(s.dtype) for s in looked_up)
        - sum(_unread_bytes(layer) for layer in experts),
        attention=tuple(_attention_of(group) for group in groups),
    )


def _expert_elements(spec: ExpertsSpec) -> int:
    """Return the weights of one expert: gate, up and down."""
    return 3 * spec.hidden_size * spec.intermediate_size


def _unread_bytes(layer: Experts) -> int:
    """Return the bytes of the experts that do not serve a token."""
    spec, held = layer.spec, layer.method.loaded_bytes(layer)
    if held is None:
        held = spec.num_experts * _expert_elements(spec) * _size(spec.dtype)
    return held * (spec.num_experts - spec.top_k) // spec.num_experts


def _attention_of(group: LayerGroup) -> AttentionWork:
    spec = group.spec
    flops = 2 * spec.num_heads * (spec.head_dim + spec.value_head_dim)
    return AttentionWork(flops_per_pair=len(group.layers) * flops, window=spec.sliding_window)


def _num_pairs(length: int, window: int | None) -> int:
    """Return how many keys the queries of a causal prompt see together."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def _size(dtype: str) -> int:
    return torch.empty(0, dtype=getattr(torch, dtype)).element_size()
