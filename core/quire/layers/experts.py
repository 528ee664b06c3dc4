"""The experts of a mixture, whose weights and products a quantization plugin decides."""

from __future__ import annotations

from torch import Tensor

from quire.interfaces.quantization import ExpertsMethod, ExpertsSpec
from quire.layers.weights import WeightStore


class Experts(WeightStore):
    """Send each token through the experts that were chosen for it."""

    spec: ExpertsSpec
    method: ExpertsMethod

    def __init__(self, spec: ExpertsSpec, method: ExpertsMethod) -> None:
        super().__init__(spec, method)
        method.create_weights(self)

    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """Return weighted sums, [num_tokens, hidden_size], for `x` of the same shape.

        `weights` and `expert_ids` [num_tokens, top_k].
        """
        return self.method.apply_experts(self, x, weights, expert_ids)
