"""Experts whose weights are e4m3: read in a checkpoint's scheme, or rounded at load."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.interfaces.quantization import ExpertsMethod, ExpertsSpec, ShardRule, WeightLayer
from quire_kernels import fp8, ops
from quire_quant.fp8.formats import ON_THE_FLY, Scheme
from quire_quant.fp8.numbers import E4M3, quantize_rows

KINDS = ("gate_up", "down")
INPUT_SCALE = "input_scale"
# The kernels take so many inputs a scale, in powers of two.
LEAST_WIDTH = 16


def why_not_experts(scheme: Scheme) -> str | None:
    """Return why experts are not served in a scheme, or None."""
    height, width = scheme.block
    if scheme.weight == "block" and (width < LEAST_WIDTH or width & (width - 1)):
        return (
            f"experts have blocks of {height} x {width}; their kernels take inputs in blocks of a "
            f"power of two from {LEAST_WIDTH} on"
        )
    return None


class Fp8Experts(ExpertsMethod):
    """All experts of a mixture, with scales as `ops.experts` takes them.

    A few tokens are multiplied as they are, more of them are rounded where the scheme rounds
    inputs and the GPU multiplies e4m3: with a scale of their own, also where the checkpoint has
    static ones, which clip what calibration did not see.
    """

    def __init__(self, spec: ExpertsSpec, scheme: Scheme) -> None:
        self.spec, self.scheme = spec, scheme
        self.device = torch.device(spec.device)
        self.shapes = {
            "gate_up": (2 * spec.intermediate_size, spec.hidden_size),
            "down": (spec.hidden_size, spec.intermediate_size),
        }
        # Outputs and inputs that share a scale; 0: all inputs do.
        self.block = scheme.block if scheme.weight == "block" else (1, 0)

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `gate_up_weight`, `down_weight` and their scales."""
        for kind in KINDS:
            shape = (self.spec.num_experts, *self.shapes[kind])
            rule = ShardRule(output_dim=1, input_dim=2)
            weight = torch.empty(shape, dtype=E4M3, device=self.device)
            layer.add_weight(f"{kind}_weight", weight, rule)
            blocks = self._scale_blocks(kind)
            sizes = (blocks[0] // 2,) * 2 if kind == "gate_up" else None
            rule = ShardRule(output_dim=1, part_sizes=sizes)
            scales = torch.empty(
                self.spec.num_experts, *blocks, dtype=torch.float32, device=self.device
            )
            if self.scheme.weight == "tensor":
                scales = scales.squeeze(-1)
            layer.add_weight(f"{kind}_{self.scheme.scale_name}", scales, rule)
            if self.scheme.inputs == "static":
                self._create_input_scales(layer, kind)

    def _create_input_scales(self, layer: WeightLayer, kind: str) -> None:
        count = 2 if kind == "gate_up" else 1
        scales = torch.empty(self.spec.num_experts, count, device=self.device)
        rule = ShardRule(output_dim=1, part_sizes=(1, 1) if count > 1 else None)
        layer.add_weight(f"{kind}_{INPUT_SCALE}", scales, rule)

    def _scale_blocks(self, kind: str) -> tuple[int, int]:
        """Return how many scales an expert has along outputs and inputs; ups have their own."""
        outputs, inputs = self.shapes[kind]
        parts = 2 if kind == "gate_up" else 1
        if self.scheme.weight == "tensor":
            return parts, 1
        height, width = self.block
        return parts * -(-(outputs // parts) // height), -(-inputs // width) if width else 1

    def loaded_bytes(self, layer: WeightLayer) -> int | None:
        """Return what is left: a byte a weight, four a scale."""
        total = 0
        for kind in KINDS:
            outputs, inputs = self.shapes[kind]
            tall, wide = self._scale_blocks(kind)
            num_scales = outputs if self.scheme.weight == "tensor" else tall * wide
            total += self.spec.num_experts * (outputs * inputs + 4 * num_scales)
        return total

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Make scales 1: weights were drawn as small as those of a model."""
        names = [self.scheme.scale_name, *self._static]
        for name in (f"{kind}_{name}" for kind in KINDS for name in names):
            layer.get_weight(name).data.fill_(1.0)

    @property
    def _static(self) -> list[str]:
        return [INPUT_SCALE] if self.scheme.inputs == "static" else []

    def finish_loading(self, layer: WeightLayer) -> None:
        """Check scales; give each output its own unless there are blocks; drop those of inputs.

        Raises: CheckpointError naming a projection with scales that are not above 0.
        """
        for kind in KINDS:
            for leaf in (self.scheme.scale_name, *self._static):
                self._check_positive(layer, kind, leaf)
            for leaf in self._static:
                layer.drop_weight(f"{kind}_{leaf}")
            name = f"{kind}_{self.scheme.scale_name}"
            scales = layer.get_weight(name).data
            if self.scheme.weight == "tensor":
                outputs = self.shapes[kind][0] // scales.shape[1]
                layer.drop_weight(name)
                each = scales.repeat_interleave(outputs, 1).unsqueeze(-1)
                layer.add_weight(name, each, ShardRule(output_dim=1))

    def _check_positive(self, layer: WeightLayer, kind: str, leaf: str) -> None:
        scales = layer.get_weight(f"{kind}_{leaf}").data
        wrong = (~(scales > 0)).nonzero()
        if not len(wrong):
            return
        spec, at = self.spec, wrong[0].tolist()
        is_up = kind == "gate_up" and at[1] >= scales.shape[1] // 2
        part = spec.parts[2] if kind == "down" else spec.parts[is_up]
        raise CheckpointError(
            f"tensor '{spec.name}.{at[0]}.{part}.{leaf}' holds the scale "
            f"{scales[tuple(at)].item():g}; scales must be above 0. The file is damaged, or was "
            f"not written by a tool for this format."
        )

    def apply_experts(
        self, layer: WeightLayer, x: Tensor, weights: Tensor, expert_ids: Tensor
    ) -> Tensor:
        """Return the weighted sums of the chosen experts."""
        name = self.scheme.scale_name
        scales = ops.ExpertScales(
            gate_up=layer.get_weight(f"gate_up_{name}"),
            down=layer.get_weight(f"down_{name}"),
            block=self.block,
            rounds_inputs=self.scheme.inputs != "plain"
            and x.is_cuda
            and fp8.computes_e4m3(x.device),
        )
        gate_up, down = layer.get_weight("gate_up_weight"), layer.get_weight("down_weight")
        return ops.experts(x, gate_up, down, weights, expert_ids, scales=scales)


class Fp8ExpertsOnTheFly(Fp8Experts):
    """The same out of weights in the model's dtype, which are dropped as soon as they are full."""

    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__(spec, ON_THE_FLY)

    def create_weights(self, layer: WeightLayer) -> None:
        """Register weights in the model's dtype, without memory until they are filled."""
        for kind in KINDS:
            shape = (self.spec.num_experts, *self.shapes[kind])
            weight = torch.empty(shape, dtype=getattr(torch, self.spec.dtype), device="meta")
            layer.add_weight(f"{kind}_weight", weight, ShardRule(output_dim=1, input_dim=2))

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Do nothing: there are no scales yet."""

    def finish_loading(self, layer: WeightLayer) -> None:
        """Quantize each output of each expert with its own scale, and drop the wide weights."""
        for kind in KINDS:
            wide = layer.get_weight(f"{kind}_weight").data
            values = torch.empty(wide.shape, dtype=E4M3, device=self.device)
            scales = torch.empty(*wide.shape[:2], 1, dtype=torch.float32, device=self.device)
            for expert, own in enumerate(wide):
                rows = quantize_rows(own)
                values[expert], scales[expert] = rows.values, rows.scales
            layer.drop_weight(f"{kind}_weight")
            del wide
            rule = ShardRule(output_dim=1, input_dim=2)
            layer.add_weight(f"{kind}_weight", values, rule)
            layer.add_weight(f"{kind}_{self.scheme.scale_name}", scales, ShardRule(output_dim=1))
