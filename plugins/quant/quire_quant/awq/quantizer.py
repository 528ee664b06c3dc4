"""Write AutoAWQ's GEMM layout. Source: Lin et al., "AWQ", 2023.

Inputs that are large are given more of the code's range: their weights are multiplied by a factor
that what makes the inputs is divided by. The factor is searched, and then each group's range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.interfaces.quantization import InputMoments, QuantizerOptions, WeightQuantizer
from quire_quant.awq.method import BITS, to_words
from quire_quant.rounding import (
    Rounding,
    bits_of,
    group_size_of,
    refuse_options,
    search_ranges,
)

# Factors are magnitudes to these powers, with the weights' own sizes taken out of them or not.
POWERS = tuple(step / 20 for step in range(20))
LEAST = 1e-4
# Factors are judged by so many outputs at most, spread over all.
MOST_ROWS = 4096


class AwqQuantizer(WeightQuantizer):
    """Smooth inputs by their magnitude, then round each group in the range that loses least."""

    needs_inputs = True

    def __init__(self, options: QuantizerOptions) -> None:
        """Take bits, group size and symmetry, which must be false."""
        refuse_options("awq", options, ("bits", "group_size", "symmetric"))
        if options.symmetric:
            raise ConfigError(
                "--symmetric is true; --method awq writes zero points. Leave the option out, or "
                "use --method gptq."
            )
        self._rounding = Rounding(
            bits=bits_of("awq", options, (BITS,), BITS),
            group_size=group_size_of(options, 128),
            symmetric=False,
            dtype=options.dtype,
        )

    def config(self, excluded: Sequence[str]) -> dict[str, Any]:
        """Return AutoAWQ's keys."""
        return {
            "quant_method": "awq",
            "bits": self._rounding.bits,
            "group_size": self._rounding.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(excluded) or None,
        }

    def smooth(self, weights: Sequence[Tensor], moments: InputMoments) -> Tensor:
        """Return the factors with which rounding to nearest changes the outputs least."""
        together = torch.cat(list(weights))
        together = together[:: -(-len(together) // MOST_ROWS)]
        groups = self._rounding.pieces(together).abs()
        share = groups / groups.amax(-1, keepdim=True).clamp(min=LEAST)
        own = share.flatten(1).mean(0).clamp(min=LEAST)
        best, least = torch.ones_like(own), float("inf")
        for power in POWERS:
            for base in (1.0, own.pow(1 - power)):
                factors = (moments.magnitude.clamp(min=LEAST).pow(power) / base).clamp(min=LEAST)
                factors = factors / (factors.max() * factors.min()).sqrt()
                loss = self._loss(together, moments.second, factors)
                if loss < least:
                    best, least = factors, loss
        return best

    def _loss(self, weight: Tensor, second: Tensor, factors: Tensor) -> float:
        groups = self._rounding.pieces(weight * factors)
        rounded = self._rounding.rounded(groups, *self._rounding.grid(groups)).flatten(1)
        wrong = rounded.div_(factors).sub_(weight)
        return float((wrong @ second).mul_(wrong).sum(dtype=torch.float64))

    def quantize(
        self, weights: Sequence[Tensor], moments: InputMoments | None
    ) -> list[dict[str, Tensor]]:
        """Return `qweight`, `qzeros` and `scales`."""
        assert moments is not None
        return [self._quantized(weight, moments.second) for weight in weights]

    def _quantized(self, weight: Tensor, second: Tensor) -> dict[str, Tensor]:
        found = search_ranges(weight, second, self._rounding)
        return {
            "qweight": to_words(found.codes.T),
            "qzeros": to_words(found.zeros.T.to(torch.uint8)),
            "scales": found.scales.T.to(torch.float16).contiguous(),
        }
