"""A linear layer whose weights and product a quantization plugin decides."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.interfaces.quantization import LayerMethod, LinearSpec, QuantizedActivation, ShardRule
from quire.layers.weights import WeightStore


class Linear(WeightStore):
    """Compute x W^T + b; several projections may lie one after another along the outputs."""

    spec: LinearSpec
    method: LayerMethod

    def __init__(self, spec: LinearSpec, method: LayerMethod) -> None:
        super().__init__(spec, method)
        method.create_weights(self)
        self.bias: Tensor | None = None
        if spec.bias:
            dtype = getattr(torch, spec.dtype)
            bias = torch.empty(spec.out_features, dtype=dtype, device=spec.device)
            del self.bias
            self.add_weight("bias", bias, ShardRule(output_dim=0))

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Sizes of the fused projections along the outputs."""
        return self.spec.output_sizes

    def forward(self, x: Tensor | QuantizedActivation) -> Tensor:
        """Return [num_tokens, out_features] for `x` [num_tokens, in_features]."""
        return self.method.apply(self, x, self.bias)

    def after_norm(
        self, addends: tuple[Tensor, Tensor], norm: tuple[Tensor, float], *, gated: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Return the layer's output for the normed sum, and the sum; None: not offered.

        `gated`: silu of the first part times the second. `LayerMethod.apply_after_norm` has more.
        """
        if not gated:
            return self.method.apply_after_norm(self, addends, norm, self.bias)
        return (
            None
            if self.bias is not None
            else self.method.apply_gated_after_norm(self, addends, norm)
        )

    def after_silu_mul(self, gate_up: Tensor) -> Tensor | None:
        """Return the layer's output for silu(first half) * second half; None: not offered."""
        return self.method.apply_after_silu_mul(self, gate_up, self.bias)
