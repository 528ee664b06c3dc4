"""The scales of a quantized KV cache: the checkpoint's, or what a short run finds, or 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.execution.checkpoint import Checkpoint, TensorInfo
from quire.execution.kv_cache import LayerGroup
from quire.execution.synthetic_batch import Span, batch_of, block_tables
from quire.interfaces.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchLimits,
    KVLayout,
)
from quire.interfaces.batch import Batch
from quire.interfaces.model import Model
from quire.layers.attention import Attention
from quire.layers.dense_attention import dense_attention

# The names of scales behind an attention layer's own: of compressed-tensors and vLLM, ModelOpt,
# compressed-tensors and Quark of old, and AutoFP8, which has one for keys and values.
KEY_NAMES = ("k_scale", "attn.k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale")
VALUE_NAMES = ("v_scale", "attn.v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale")
# Of queries and weights: products are made of wide numbers here, which need none.
OTHER_NAMES = ("q_scale", "attn.q_scale", "attn.prob_scale", "q_proj.q_scale")

CALIBRATION_TOKENS = 256
# A key or value may be so many times larger than any in the calibrating run before it is clipped:
# below the smallest normal number, 1 / 28,672 of the largest of e4m3, precision is lost.
MARGIN = 2.0


def scale_names(layers: Iterable[Attention]) -> set[str]:
    """Return every name under which a checkpoint may hold a scale of the layers' cache."""
    names = (*KEY_NAMES, *VALUE_NAMES, *OTHER_NAMES)
    return {f"{layer.name}.{name}" for layer in layers for name in names}


def has_scales(groups: Sequence[LayerGroup], checkpoint: Checkpoint) -> bool:
    """Answer whether a checkpoint has scales of some layer's cache."""
    names = (*KEY_NAMES, *VALUE_NAMES)
    layers = [layer for group in groups for layer in group.layers]
    return any(f"{layer.name}.{name}" in checkpoint.tensors for layer in layers for name in names)


def source_of_scales(
    groups: Sequence[LayerGroup], checkpoint: Checkpoint, wanted: str
) -> str | None:
    """Return "checkpoint", "calibrated" or "unit"; None where no cache is quantized."""
    if not any(group.spec.has_quantized_kv for group in groups):
        return None
    if wanted != "auto":
        return wanted
    return "checkpoint" if has_scales(groups, checkpoint) else "calibrated"


def describe_source(source: str | None) -> str | None:
    """Return where scales come from, in words."""
    words = {
        "checkpoint": "the checkpoint's",
        "calibrated": f"one a head, calibrated at the start by {CALIBRATION_TOKENS} random tokens",
        "unit": "1",
    }
    return None if source is None else words[source]


@torch.inference_mode()
def set_scales(
    model: Model,
    groups: Sequence[LayerGroup],
    checkpoint: Checkpoint,
    limits: BatchLimits,
    *,
    source: str,
) -> None:
    """Give every layer of a quantized cache float32 scales [num_kv_heads].

    Raises: CheckpointError naming a scale that is missing, of another shape, or no number above 0.
    """
    quantized = [group for group in groups if group.spec.has_quantized_kv]
    if source == "calibrated":
        _calibrate(model, groups, limits)
        return
    for group in quantized:
        for layer in group.layers:
            if source == "checkpoint":
                layer.k_scale = _read(layer, KEY_NAMES, checkpoint, group.spec)
                layer.v_scale = _read(layer, VALUE_NAMES, checkpoint, group.spec)
            else:
                ones = torch.ones(group.spec.num_kv_heads, device=group.spec.device)
                layer.k_scale, layer.v_scale = ones, ones.clone()


def _read(
    layer: Attention, names: Sequence[str], checkpoint: Checkpoint, spec: AttentionSpec
) -> Tensor:
    found = [n for n in (f"{layer.name}.{name}" for name in names) if n in checkpoint.tensors]
    if not found:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor '{layer.name}.{names[0]}' is missing, while other layers "
            "have scales of the KV cache. --kv-cache-scales calibrated finds others at the start."
        )
    tensor = checkpoint.tensors[found[0]]
    count = math.prod(tensor.shape)
    if count not in (1, spec.num_kv_heads):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has {count} numbers; a scale of the KV cache "
            f"has 1, or one for each of {spec.num_kv_heads} KV heads."
        )
    values = _values(tensor)
    if not bool((values.isfinite() & (values > 0)).all()):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} holds {values.min().item():g}; a scale of the "
            "KV cache is a number above 0. --kv-cache-scales calibrated finds others at the start."
        )
    return values.expand(spec.num_kv_heads).contiguous().to(spec.device)


def _values(tensor: TensorInfo) -> Tensor:
    """Return a small tensor of a file, float32 [count]."""
    from safetensors import safe_open

    with safe_open(Path(tensor.file), framework="pt", device="cpu") as reader:
        found: Tensor = reader.get_tensor(tensor.name)
    if not found.is_floating_point():
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}; a scale is a float."
        )
    return found.float().flatten()


class _Observing(AttentionBackend):
    """Attend to the step's own tokens, and remember the largest key and value of every head."""

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Serve what the formula serves."""
        return None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Keep nothing."""
        return KVLayout(name="none", block_shape=(0,), dtype=spec.dtype)

    def plan(self, batch: Batch, group: int) -> None:
        """Plan nothing."""

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Any
    ) -> None:
        """Set the layer's scales."""
        assert isinstance(layer, Attention), layer
        largest = torch.finfo(getattr(torch, self.spec.kv_dtype)).max
        layer.k_scale, layer.v_scale = _scale_for(k, largest), _scale_for(v, largest)

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: Any,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Fill `out` by the formula: the step is one sequence from its beginning."""
        sinks, slopes = layer.sinks, layer.alibi_slopes
        found = dense_attention(
            self.spec, q, k, v, dtype=torch.float32, sinks=sinks, alibi_slopes=slopes
        )
        out.copy_(found)


def _scale_for(x: Tensor, largest: float) -> Tensor:
    """Return the scale of each head of `x` [num_tokens, num_kv_heads, dim]; 1 for one of zeros."""
    most = x.float().abs().amax(dim=(0, 2))
    is_usable = most.isfinite() & (most > 0)
    return torch.where(is_usable, most * (MARGIN / largest), 1.0)


def _calibrate(model: Model, groups: Sequence[LayerGroup], limits: BatchLimits) -> None:
    """Run random tokens through the model and set the scales by what its layers write.

    As many whatever a step may have: how prompts are cut must not change what they are given.
    """
    num_tokens = min(CALIBRATION_TOKENS, limits.max_model_len)
    spec = groups[0].spec
    for number, group in enumerate(groups):
        observer = _Observing(group.spec, limits, {})
        for layer in group.layers:
            layer.bind(observer, torch.empty(0, device=spec.device), number)
    tables, _ = block_tables([num_tokens], spec.block_size)
    batch = batch_of([Span(0, 0, num_tokens)], tables, spec, len(groups) - 1)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(model.config.vocab_size, (num_tokens,), generator=generator)
    batch.token_ids = token_ids.int().to(spec.device)
    batch.plans = [None] * len(groups)
    model.forward(model.embed(batch.token_ids), batch)
