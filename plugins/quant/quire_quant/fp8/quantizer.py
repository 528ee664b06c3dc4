"""Write checkpoints in e4m3: compressed-tensors' `float-quantized`, activations by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.interfaces.quantization import InputMoments, QuantizerOptions, WeightQuantizer
from quire_kernels.fp8 import LARGEST, rounded
from quire_quant import compressed
from quire_quant.rounding import refuse_options

NUMBER = {"num_bits": 8, "type": "float", "symmetric": True}


class Fp8Quantizer(WeightQuantizer):
    """Round to nearest with the scale of each output's largest weight."""

    def __init__(self, options: QuantizerOptions) -> None:
        """Take no option."""
        refuse_options("fp8", options, ())
        self._dtype = getattr(torch, options.dtype)

    def config(self, excluded: Sequence[str]) -> dict[str, Any]:
        """Return the FP8_DYNAMIC scheme."""
        weights = {**NUMBER, "strategy": "channel", "observer": "minmax"}
        inputs = {**NUMBER, "strategy": "token", "dynamic": True}
        return compressed.written_config("float-quantized", weights, inputs, excluded)

    def quantize(
        self, weights: Sequence[Tensor], moments: InputMoments | None
    ) -> list[dict[str, Tensor]]:
        """Return `weight` in e4m3 and `weight_scale` [outputs, 1] in the model's dtype."""
        return [self._quantized(weight) for weight in weights]

    def _quantized(self, weight: Tensor) -> dict[str, Tensor]:
        # In the model's dtype, as other readers hold it: the values are made for that scale.
        scales = (weight.abs().amax(1, keepdim=True) / LARGEST).to(self._dtype)
        scales = scales.clamp(min=torch.finfo(self._dtype).tiny)
        return {"weight": rounded(weight, scales.float()), "weight_scale": scales}
