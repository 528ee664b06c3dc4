"""Experts of gpt-oss whose file is in MXFP4, made wide when they are loaded.

Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification 1.0", 2023: numbers of
four bits, e2m1, of which 32 neighbours share a power of two, e8m0.
"""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from quire.errors import CheckpointError, ConfigError
from quire.interfaces.quantization import ShardRule, WeightLayer, WeightMethod

BLOCK = 32
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EXPONENT_BIAS, NAN = 127, 255
# Drawn numbers times this are about as large as other weights.
DRAWN_EXPONENT = EXPONENT_BIAS - 7
KINDS = ("gate_up_proj", "down_proj")


@frozen(kw_only=True)
class StackedSpec:
    """All experts of a layer: `sizes` are inputs and outputs of each of KINDS."""

    name: str
    num_experts: int
    sizes: dict[str, tuple[int, int]]
    dtype: torch.dtype
    device: Any


def widened(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return numbers float32 [outputs, inputs] of one expert.

    `blocks` uint8 [outputs, inputs / 32, 16], the first of two numbers in a byte's low bits;
    `scales` uint8 [outputs, inputs / 32].
    """
    signed = torch.tensor([*NUMBERS, *(-n for n in NUMBERS)], device=blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    powers = (scales.int() - EXPONENT_BIAS).unsqueeze(-1)
    return torch.ldexp(signed[codes.int()], powers).flatten(-2)


class Mxfp4Weights(WeightMethod):
    """Read blocks, scales and biases; keep `gate_up_proj` and `down_proj` as [inputs, outputs]."""

    def __init__(self, spec: StackedSpec) -> None:
        self.spec = spec
        for kind, (inputs, _) in spec.sizes.items():
            if inputs % BLOCK:
                raise ConfigError(
                    f"{spec.name}.{kind} has {inputs} inputs; MXFP4 has blocks of {BLOCK}, and the "
                    "sizes in config.json make no whole number of them."
                )

    def create_weights(self, layer: WeightLayer) -> None:
        """Register the file's tensors; blocks and scales have no memory until they are filled."""
        count, rule = self.spec.num_experts, ShardRule()
        for kind, (inputs, outputs) in self.spec.sizes.items():
            shape = (count, outputs, inputs // BLOCK)
            blocks = torch.empty(*shape, BLOCK // 2, dtype=torch.uint8, device="meta")
            layer.add_weight(f"{kind}_blocks", blocks, rule)
            scales = torch.empty(shape, dtype=torch.uint8, device="meta")
            layer.add_weight(f"{kind}_scales", scales, rule)
            layer.add_weight(f"{kind}_bias", self._empty(count, outputs), rule)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.spec.dtype, device=self.spec.device)

    def loaded_bytes(self, layer: WeightLayer) -> int:
        """Return what is left: wide weights, and biases."""
        each = sum((inputs + 1) * outputs for inputs, outputs in self.spec.sizes.values())
        return self.spec.num_experts * each * self.spec.dtype.itemsize

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Make the weights about as large as others."""
        for kind in KINDS:
            layer.get_weight(f"{kind}_scales").data.fill_(DRAWN_EXPONENT)

    def finish_loading(self, layer: WeightLayer) -> None:
        """Make weights wide, an expert at a time.

        Raises: CheckpointError naming scales that are NaN or beyond the numbers of the dtype.
        """
        for kind, (inputs, outputs) in self.spec.sizes.items():
            blocks = layer.get_weight(f"{kind}_blocks").data
            scales = layer.get_weight(f"{kind}_scales").data
            wide = self._empty(self.spec.num_experts, inputs, outputs)
            for expert in range(self.spec.num_experts):
                wide[expert] = widened(blocks[expert], scales[expert]).T
            if not bool((scales != NAN).all() & wide.isfinite().all()):
                raise CheckpointError(
                    f"tensor '{self.spec.name}.{kind}_scales' holds a scale that is NaN, or beyond "
                    f"what {str(self.spec.dtype).removeprefix('torch.')} holds; the file is "
                    "damaged, download it again."
                )
            for name in ("blocks", "scales"):
                layer.drop_weight(f"{kind}_{name}")
            layer.add_weight(kind, wide, ShardRule())
