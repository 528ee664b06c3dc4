"""Write checkpoints of 4 bits without calibration: compressed-tensors' `pack-quantized`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.interfaces.quantization import InputMoments, QuantizerOptions, WeightQuantizer
from quire_quant import compressed
from quire_quant.rounding import (
    Rounding,
    bits_of,
    group_size_of,
    refuse_options,
    round_to_nearest,
    to_words,
)


class Int4Quantizer(WeightQuantizer):
    """Round to nearest in groups; symmetrically unless asked for otherwise.

    Transformers 5.24 with compressed-tensors 0.20 loads no packed zero points, not its own either.
    """

    def __init__(self, options: QuantizerOptions) -> None:
        """Take bits, group size and symmetry."""
        refuse_options("int4", options, ("bits", "group_size", "symmetric"))
        self._dtype = getattr(torch, options.dtype)
        self._rounding = Rounding(
            bits=bits_of("int4", options, (4,), 4),
            group_size=group_size_of(options, 128),
            symmetric=options.symmetric is not False,
            dtype=options.dtype,
        )

    def config(self, excluded: Sequence[str]) -> dict[str, Any]:
        """Return the W4A16 scheme."""
        rounding = self._rounding
        weights: dict[str, Any] = {
            "num_bits": rounding.bits,
            "type": "int",
            "symmetric": rounding.symmetric,
            "strategy": "group" if rounding.group_size else "channel",
            "group_size": rounding.group_size,
            "observer": "minmax",
        }
        return compressed.written_config("pack-quantized", weights, None, excluded)

    def quantize(
        self, weights: Sequence[Tensor], moments: InputMoments | None
    ) -> list[dict[str, Tensor]]:
        """Return `weight_packed`, `weight_scale`, `weight_shape` and, asymmetric, zero points."""
        return [self._quantized(weight) for weight in weights]

    def _quantized(self, weight: Tensor) -> dict[str, Tensor]:
        bits, found = self._rounding.bits, round_to_nearest(weight, self._rounding)
        tensors = {
            "weight_packed": to_words(found.codes, bits),
            "weight_scale": found.scales.to(self._dtype),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not self._rounding.symmetric:
            zeros = to_words(found.zeros.T.to(torch.uint8), bits)
            tensors["weight_zero_point"] = zeros.T.contiguous()
        return tensors
