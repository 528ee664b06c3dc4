"""Keep weights in the model's dtype. On a CPU 16-bit weights are packed once for oneDNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from quire.interfaces.quantization import (
    EmbeddingSpec,
    ExpertsMethod,
    ExpertsSpec,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
    QuantizedActivation,
    ShardRule,
    WeightLayer,
)
from quire_kernels import fixed_rows, ops
from quire_kernels.mixtures import sum_over_experts

# For so few PyTorch's `embedding` has a kernel that takes them one after another on a GPU.
FEW_TOKENS = 16
# The overload itself: finding it by name costs 8 us a call.
_packed_linear = torch.ops.mkldnn._linear_pointwise.default


def _packing_pays(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies packed weights of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


class DenseProduct(LayerMethod):
    """x W^T + b, W [out_features, in_features].

    Packing pays for 16-bit weights on a CPU at one row; float32 is left to `F.linear`, which was
    faster at one row on the machines measured (docs/performance.md).
    """

    def __init__(self, out_features: int, in_features: int, dtype: str, device: str) -> None:
        self.shape = (out_features, in_features)
        self.dtype = getattr(torch, dtype)
        self.device = torch.device(device)
        self.packed: Tensor | None = None

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight` [out_features, in_features]."""
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))

    def finish_loading(self, layer: WeightLayer) -> None:
        """Pack for oneDNN where that pays, and drop the plain weight."""
        if self.device.type != "cpu" or not _packing_pays(self.dtype):
            return
        weight = layer.get_weight("weight")
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.data, 1)
        layer.drop_weight("weight")

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Return the product."""
        assert isinstance(x, Tensor)
        if self.packed is not None:
            return _packed_linear(x, self.packed, bias, "none", [], "")
        return ops.linear(x, layer.get_weight("weight"), bias)

    def apply_after_norm(
        self,
        layer: WeightLayer,
        addends: tuple[Tensor, Tensor],
        norm: tuple[Tensor, float],
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Offer it for one token on a GPU, where a launch costs as much as a norm."""
        if not ops.fuses_norm(addends[0]):
            return None
        return ops.add_rms_norm_linear(*addends, *norm, layer.get_weight("weight"), bias)

    def apply_gated_after_norm(
        self, layer: WeightLayer, addends: tuple[Tensor, Tensor], norm: tuple[Tensor, float]
    ) -> tuple[Tensor, Tensor] | None:
        """Offer it on a GPU, where a few rows are one launch less."""
        if self.device.type != "cuda":
            return None
        return ops.add_rms_norm_linear_silu_mul(*addends, *norm, layer.get_weight("weight"))


class FixedProduct(DenseProduct):
    """The same, of which a row has the same bits however many there are.

    On a GPU by a kernel of its own, on a CPU by the library's products of some rows at a time.
    """

    batch_invariant = True

    def __init__(self, shape: tuple[int, int], dtype: str, device: str, *, bias: bool) -> None:
        super().__init__(*shape, dtype, device)
        self._bias = bias
        self._sizes: tuple[int, ...] = ()

    def finish_loading(self, layer: WeightLayer) -> None:
        """Pack where that pays, and find out how many rows at a time give equal bits."""
        super().finish_loading(layer)
        self._sizes = self._equal_sizes()

    def _equal_sizes(self) -> tuple[int, ...]:
        if self.device.type != "cpu":
            return fixed_rows.sizes_on_gpu(self.shape, self.dtype, self._bias, self.device)
        make = _packed_product if _packing_pays(self.dtype) else fixed_rows.plain
        num_threads = torch.get_num_threads()
        return fixed_rows.sizes_on_cpu(make, self.shape, self.dtype, self._bias, num_threads)

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Return the product."""
        assert isinstance(x, Tensor)
        # A tied head is never told that the weights are there.
        self._sizes = self._sizes or self._equal_sizes()
        if x.is_cuda:
            return fixed_rows.in_tiles(x, layer.get_weight("weight"), bias, self._sizes)
        product = super().apply
        return fixed_rows.in_pieces(lambda rows: product(layer, rows, bias), x, self._sizes)

    def apply_after_norm(self, *_args: Any) -> None:
        """Offer nothing: what is done at once is cut by the number of rows."""

    def apply_gated_after_norm(self, *_args: Any) -> None:
        """Offer nothing."""


def _packed_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return lambda x: _packed_linear(x, packed, bias, "none", [], "")


class DenseLookup(LayerMethod):
    """Rows of W [num_embeddings, embedding_dim]."""

    batch_invariant = True

    def __init__(self, spec: EmbeddingSpec) -> None:
        self.spec = spec

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight` [num_embeddings, embedding_dim]."""
        shape = (self.spec.num_embeddings, self.spec.embedding_dim)
        dtype = getattr(torch, self.spec.dtype)
        weight = torch.empty(shape, dtype=dtype, device=self.spec.device)
        layer.add_weight("weight", weight, ShardRule(output_dim=0))

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Return the embeddings of token ids `x` [num_tokens]."""
        assert isinstance(x, Tensor)
        weight = layer.get_weight("weight")
        if x.is_cuda and len(x) <= FEW_TOKENS:
            return weight[x]
        return functional.embedding(x, weight)


class DenseExperts(ExpertsMethod):
    """All experts of a mixture, gates and ups in one weight.

    On a CPU 16-bit weights are packed for oneDNN, each expert's apart: at one row 2048 x 1536 in
    bfloat16 takes 215 us instead of 397 (one thread of a CPU with avx512_bf16).
    """

    def __init__(self, spec: ExpertsSpec) -> None:
        self.spec = spec
        self.packed: dict[str, list[Tensor]] = {}

    def create_weights(self, layer: WeightLayer) -> None:
        """Register weights [num_experts, 2 * size, hidden_size] and back."""
        spec, dtype = self.spec, getattr(torch, self.spec.dtype)
        rule = ShardRule(output_dim=1, input_dim=2)
        for name, outputs, inputs in (
            ("gate_up_weight", 2 * spec.intermediate_size, spec.hidden_size),
            ("down_weight", spec.hidden_size, spec.intermediate_size),
        ):
            shape = (spec.num_experts, outputs, inputs)
            layer.add_weight(name, torch.empty(shape, dtype=dtype, device=spec.device), rule)

    def finish_loading(self, layer: WeightLayer) -> None:
        """Pack for oneDNN where that pays, and drop the plain weights."""
        if torch.device(self.spec.device).type != "cpu":
            return
        if not _packing_pays(getattr(torch, self.spec.dtype)):
            return
        for name in ("gate_up_weight", "down_weight"):
            weight = layer.get_weight(name).data
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self.packed[name] = [reorder(own, 1) for own in weight]
            layer.drop_weight(name)
            del weight

    def _packed_expert(self, x: Tensor, expert: int) -> Tensor:
        gate_up, down = self.packed["gate_up_weight"][expert], self.packed["down_weight"][expert]
        hidden = ops.silu_mul(_packed_linear(x, gate_up, None, "none", [], ""))
        return _packed_linear(hidden, down, None, "none", [], "")

    def apply_experts(
        self, layer: WeightLayer, x: Tensor, weights: Tensor, expert_ids: Tensor
    ) -> Tensor:
        """Return the weighted sums of the chosen experts."""
        if self.packed:
            return sum_over_experts(
                x, weights, expert_ids, self.spec.num_experts, self._packed_expert
            )
        gate_up, down = layer.get_weight("gate_up_weight"), layer.get_weight("down_weight")
        return ops.experts(x, gate_up, down, weights, expert_ids)


class NoQuantization(QuantizationMethod):
    """Serve linears, embeddings, heads and experts in the model's dtype.

    Of a file in MXFP4 too: gpt-oss, whose experts alone are so, makes them wide itself.
    """

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Serve linear and embedding layers everywhere, experts where there is a product."""
        if isinstance(spec, ExpertsSpec) and self.config:
            return "MXFP4 is read of gpt-oss alone; a checkpoint in 16 bits would be served"
        if isinstance(spec, ExpertsSpec):
            return ops.why_no_experts(spec.device)
        if isinstance(spec, (LinearSpec, EmbeddingSpec)):
            return None
        return f"it has no method for {type(spec).__name__}"

    def method_for(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod | None:
        """Return a method in the layer's own dtype."""
        if isinstance(spec, ExpertsSpec):
            return DenseExperts(spec)
        if isinstance(spec, LinearSpec):
            return _product(spec, (spec.out_features, spec.in_features), bias=spec.bias)
        if isinstance(spec, EmbeddingSpec) and spec.is_head:
            return _product(spec, (spec.num_embeddings, spec.embedding_dim), bias=False)
        if isinstance(spec, EmbeddingSpec):
            return DenseLookup(spec)
        return None


def _product(
    spec: LinearSpec | EmbeddingSpec, shape: tuple[int, int], *, bias: bool
) -> DenseProduct:
    if spec.batch_invariant and fixed_rows.serves(spec.device):
        return FixedProduct(shape, spec.dtype, spec.device, bias=bias)
    return DenseProduct(*shape, spec.dtype, spec.device)
