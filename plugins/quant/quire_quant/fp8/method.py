"""Choose how each layer is kept in e4m3, load its weights and scales, and multiply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from quire.errors import CheckpointError
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
from quire_kernels import fp8, ops
from quire_quant.fp8.experts import Fp8Experts, Fp8ExpertsOnTheFly, why_not_experts
from quire_quant.fp8.formats import ON_THE_FLY, Scheme, read_config
from quire_quant.fp8.numbers import (
    E4M3,
    dequantized,
    piece_rows,
    quantize,
    quantize_rows,
    quantize_static,
)
from quire_quant.fp8.products import Weight, dequantized_weight, multiply
from quire_quant.module_names import is_router, part_names

DEVICES = ("cpu", "cuda", "meta")


class Fp8Product(LayerMethod):
    """x W^T + b with W in e4m3, read from a checkpoint in one of the schemes.

    Scales of a whole projection become scales of its outputs, so that fused projections keep their
    own; no weight is rounded twice.
    """

    def __init__(self, spec: LinearSpec | EmbeddingSpec, scheme: Scheme) -> None:
        self.names = part_names(spec)
        self.scheme = scheme
        if isinstance(spec, LinearSpec):
            self.sizes, self.num_inputs = spec.output_sizes, spec.in_features
        else:
            self.sizes, self.num_inputs = (spec.num_embeddings,), spec.embedding_dim
        self.dtype = getattr(torch, spec.dtype)
        self.device = torch.device(spec.device)
        self.has_weight = False  # a tied head has the embedding's
        self.is_uniform = False
        self.shares_input_scale = True

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return sum(self.sizes), self.num_inputs

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight`, its scales and, where they are static, `input_scale`."""
        self.has_weight = True
        width = self.scheme.block[1] or None
        rule = ShardRule(output_dim=0, input_dim=1, group_size=width)
        layer.add_weight("weight", self._empty(*self.shape, dtype=E4M3), rule)
        each = ShardRule(output_dim=0, part_sizes=(1,) * len(self.sizes))
        name = self.scheme.scale_name
        if self.scheme.weight == "tensor":
            layer.add_weight(name, self._empty(len(self.sizes)), each)
        elif self.scheme.weight == "channel":
            layer.add_weight(name, self._empty(self.shape[0], 1), ShardRule(output_dim=0))
        else:
            blocks = tuple(-(-size // self.scheme.block[0]) for size in self.sizes)
            scales = self._empty(sum(blocks), -(-self.num_inputs // self.scheme.block[1]))
            layer.add_weight(name, scales, evolve(rule, group_size=None, part_sizes=blocks))
        if self.scheme.inputs == "static":
            layer.add_weight("input_scale", self._empty(len(self.sizes)), each)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def loaded_bytes(self, layer: WeightLayer) -> int | None:
        """Return what is left: a byte a weight, four a scale."""
        if not self.has_weight:
            return 0
        outputs, inputs = self.shape
        num_scales = outputs
        if self.scheme.weight == "block":
            num_scales = layer.get_weight(self.scheme.scale_name).numel()
        num_scales += len(self.sizes) if self.scheme.inputs == "static" else 0
        return outputs * inputs + 4 * num_scales

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Make scales 1: weights were drawn as small as those of a model."""
        for name in (self.scheme.scale_name, "input_scale"):
            if name != "input_scale" or self.scheme.inputs == "static":
                layer.get_weight(name).data.fill_(1.0)

    def finish_loading(self, layer: WeightLayer) -> None:
        """Check scales; give each output its own unless there are blocks.

        Raises: CheckpointError naming a tensor of scales that are not above 0.
        """
        if not self.has_weight:
            return
        name = self.scheme.scale_name
        scales = layer.get_weight(name).data
        self._check_positive(name, scales, layer)
        if self.scheme.weight == "tensor":
            self.is_uniform = len(set(scales.tolist())) == 1
            sizes = torch.tensor(self.sizes, device=scales.device)
            scales = scales.repeat_interleave(sizes)[:, None]
        if self.scheme.weight != "block":
            layer.drop_weight(name)
            layer.add_weight(name, scales.contiguous(), ShardRule(output_dim=0))
        if self.scheme.inputs == "static":
            given = layer.get_weight("input_scale").data
            self._check_positive("input_scale", given, layer)
            self.shares_input_scale = len(set(given.tolist())) == 1

    def _check_positive(self, name: str, scales: Tensor, layer: WeightLayer) -> None:
        if bool((scales > 0).all()):
            return
        if self.scheme.weight == "block" and name != "input_scale":
            counts = [-(-size // self.scheme.block[0]) for size in self.sizes]
        else:
            is_channel = self.scheme.weight == "channel" and name != "input_scale"
            counts = list(self.sizes) if is_channel else [1] * len(self.sizes)
        for part, found in zip(self.names, scales.split(counts), strict=True):
            wrong = found[~(found > 0)]
            if wrong.numel():
                raise CheckpointError(
                    f"tensor '{part}.{name}' holds the scale {wrong[0].item():g}; scales must be "
                    "above 0. The file is damaged, or was not written by a tool for this format."
                )

    def _weight(self, layer: WeightLayer) -> Weight:
        return Weight(
            values=layer.get_weight("weight"),
            scales=layer.get_weight(self.scheme.scale_name),
            sizes=self.sizes,
            block=self.scheme.block if self.scheme.weight == "block" else None,
            is_uniform=self.is_uniform,
        )

    def dequantize(self, layer: WeightLayer) -> Tensor | None:
        """Return values times scales, float32."""
        if not self.has_weight:
            return layer.get_weight("weight").float()
        return dequantized_weight(self._weight(layer))

    def rounded_input(self, layer: WeightLayer, x: Tensor) -> Tensor | None:
        """Return the inputs with their scales, float32; None where projections see different."""
        if self.scheme.inputs == "plain" or not self.has_weight or not self.shares_input_scale:
            return None
        return dequantized(self._quantized(layer, x), self._group)

    @property
    def _group(self) -> int | None:
        return self.scheme.block[1] if self.scheme.inputs == "group" else None

    def _scaling(self, layer: WeightLayer) -> fp8.Scaling:
        if self.scheme.inputs == "static":
            return fp8.Scaling(given=layer.get_weight("input_scale")[:1])
        return fp8.Scaling(group=self._group, largest=self.scheme.largest)

    def _quantized(self, layer: WeightLayer, x: Tensor) -> QuantizedActivation:
        return quantize(x, self._scaling(layer))

    def _rounds_in_one_pass(self, layer: WeightLayer, x: Tensor) -> bool:
        """Answer whether inputs are rounded by the launch that makes them, of what x has."""
        if self.scheme.inputs == "plain" or not self.has_weight or not self.shares_input_scale:
            return False
        return fp8.rounds_in_one_pass(x, self.num_inputs, self._scaling(layer))

    def _multiply(
        self, layer: WeightLayer, rounded: fp8.Rounded, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        x = QuantizedActivation(values=rounded[0], scales=rounded[1])
        return multiply(x, self._weight(layer), bias, dtype, group=self._group)

    def apply_after_norm(
        self,
        layer: WeightLayer,
        addends: tuple[Tensor, Tensor],
        norm: tuple[Tensor, float],
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Norm and round in one pass, on a GPU."""
        if not self._rounds_in_one_pass(layer, addends[0]):
            return None
        rounded, total = fp8.add_rms_norm_quantize(*addends, *norm, self._scaling(layer))
        return self._multiply(layer, rounded, bias, addends[0].dtype), total

    def apply_after_silu_mul(
        self, layer: WeightLayer, gate_up: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """Do SiLU, multiply and round in one pass, on a GPU."""
        if not self._rounds_in_one_pass(layer, gate_up):
            return None
        rounded = fp8.silu_mul_quantize(gate_up, self._scaling(layer))
        return self._multiply(layer, rounded, bias, gate_up.dtype)

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Quantize the inputs as the scheme says, and multiply."""
        assert isinstance(x, Tensor)
        if not self.has_weight:
            return ops.linear(x, layer.get_weight("weight"), bias)
        weight = self._weight(layer)
        if self.scheme.inputs == "plain":
            return multiply(x, weight, bias, x.dtype)
        if not self.shares_input_scale:
            return self._apply_by_part(layer, x, weight, bias)
        return multiply(self._quantized(layer, x), weight, bias, x.dtype, group=self._group)

    def _apply_by_part(
        self, layer: WeightLayer, x: Tensor, weight: Weight, bias: Tensor | None
    ) -> Tensor:
        """Multiply projection by projection: calibrated apart, they see different inputs."""
        scales = layer.get_weight("input_scale")
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        return torch.cat(
            [
                multiply(quantize_static(x, scales[i : i + 1]), weight.part(i), part, x.dtype)
                for i, part in enumerate(biases)
            ],
            dim=1,
        )


class Fp8OnTheFly(Fp8Product):
    """The same out of a weight in the model's dtype, which is dropped as soon as it is full."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec, ON_THE_FLY)

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight` in the model's dtype, without memory until it is filled."""
        self.has_weight = True
        weight = torch.empty(self.shape, dtype=self.dtype, device="meta")
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Do nothing: there are no scales yet."""

    def finish_loading(self, layer: WeightLayer) -> None:
        """Quantize each output with its own scale, and drop the wide weight."""
        weight, scales = self._quantized_weight(layer.get_weight("weight").data)
        layer.drop_weight("weight")
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))
        layer.add_weight(self.scheme.scale_name, scales, ShardRule(output_dim=0))

    def _quantized_weight(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and scales; a kernel takes all rows at once, and nothing wide beside them.

        In PyTorch a few rows are taken at once.
        """
        if fp8.rounds_in_one_pass(wide, self.num_inputs, fp8.Scaling()):
            return fp8.quantize(wide, fp8.Scaling())
        weight, scales = self._empty(*self.shape, dtype=E4M3), self._empty(self.shape[0], 1)
        step = piece_rows(wide)
        for first in range(0, self.shape[0], step):
            rows = slice(first, first + step)
            piece = quantize_rows(wide[rows])
            weight[rows], scales[rows] = piece.values, piece.scales
        return weight, scales


class Fp8(QuantizationMethod):
    """Linear layers in e4m3; embeddings, and heads unless a format says so, are left alone."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read a `quantization_config`. Raises: ConfigError naming the key."""
        super().__init__(config)
        self._format = read_config(config)

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Refuse other devices, and fused layers whose projections are kept in different ways."""
        if not isinstance(spec, LinearSpec | EmbeddingSpec | ExpertsSpec):
            return f"it has no method for {type(spec).__name__}"
        device = torch.device(spec.device).type
        if device not in DEVICES:
            return f"it runs on cpu and cuda, not on {device}"
        if isinstance(spec, ExpertsSpec) and (reason := ops.why_no_experts(spec.device)):
            return reason
        if self._format is None or isinstance(spec, EmbeddingSpec):
            return None
        schemes = {name: self._scheme_of(name) for name in part_names(spec)}
        if len(set(schemes.values())) == 1:
            scheme = next(iter(schemes.values()))
            if scheme is None or not isinstance(spec, ExpertsSpec):
                return None
            return why_not_experts(scheme)
        told = ", ".join(f"{name}: {_told(scheme)}" for name, scheme in schemes.items())
        return f"its projections are one product, and quantization_config keeps them apart ({told})"

    def method_for(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod | None:
        """Return a method for linear layers, experts, and heads, unless they are excluded."""
        if isinstance(spec, ExpertsSpec):
            return self._method_for_experts(spec)
        is_head = isinstance(spec, EmbeddingSpec) and spec.is_head
        if not isinstance(spec, LinearSpec) and not is_head:
            return None
        assert isinstance(spec, LinearSpec | EmbeddingSpec)
        if self._format is None:
            if not isinstance(spec, LinearSpec) or is_router(spec.name):
                return None
            return Fp8OnTheFly(spec)
        if is_head and not self._format.has_heads:
            return None
        scheme = self._scheme_of(part_names(spec)[0])
        return None if scheme is None else Fp8Product(spec, scheme)

    def _scheme_of(self, name: str) -> Scheme | None:
        assert self._format is not None
        # Routers are no linear layers to some tools, which neither quantize nor exclude them.
        is_kept = is_router(name) and self.is_plain(name)
        return None if is_kept else self._format.scheme_of(name)

    def _method_for_experts(self, spec: ExpertsSpec) -> ExpertsMethod | None:
        if self._format is None:
            return Fp8ExpertsOnTheFly(spec)
        scheme = self._format.scheme_of(part_names(spec)[0])
        return None if scheme is None else Fp8Experts(spec, scheme)


def _told(scheme: Scheme | None) -> str:
    return "not quantized" if scheme is None else f"a scale a {scheme.weight}"
