"""Write GPTQ checkpoints, version 1. Source: Frantar et al., "GPTQ", 2022.

Inputs are rounded one after another, and what an input's rounding changes in the outputs is made
good, as far as it can be, by the weights of the inputs that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.interfaces.quantization import InputMoments, QuantizerOptions, WeightQuantizer
from quire_quant.rounding import (
    Codes,
    Rounding,
    bits_of,
    group_size_of,
    refuse_options,
    to_words,
)

BITS = (2, 3, 4, 8)
# Inputs whose corrections reach the rest of the weight in one product.
BLOCK = 128
DAMPING = 0.01
MOST_DAMPING = 1.0


class GptqQuantizer(WeightQuantizer):
    """Compensate each rounding; symmetrically unless asked for otherwise."""

    needs_inputs = True

    def __init__(self, options: QuantizerOptions) -> None:
        """Take all options."""
        taken = ("bits", "group_size", "symmetric", "act_order", "damping")
        refuse_options("gptq", options, taken)
        self._damping = DAMPING if options.damping is None else options.damping
        if not 0 < self._damping <= MOST_DAMPING:
            raise ConfigError(f"--damping is {self._damping}; allowed: above 0, up to 1.")
        self._has_order = bool(options.act_order)
        symmetric = options.symmetric is not False
        self._rounding = Rounding(
            bits=bits_of("gptq", options, BITS, 4),
            group_size=group_size_of(options, 128),
            symmetric=symmetric,
            dtype=options.dtype,
            # Version 1 stores zero points minus one, and some readers do not wrap round.
            least_zero=1,
        )

    def config(self, excluded: Sequence[str]) -> dict[str, Any]:
        """Return GPTQModel's keys."""
        found: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": self._rounding.bits,
            "group_size": self._rounding.group_size or -1,
            "sym": self._rounding.symmetric,
            "desc_act": self._has_order,
            "damp_percent": self._damping,
            "true_sequential": False,
            "lm_head": False,
        }
        left = [name for name in excluded if name != "lm_head"]
        if left:
            found["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in left}
        return found

    def quantize(
        self, weights: Sequence[Tensor], moments: InputMoments | None
    ) -> list[dict[str, Tensor]]:
        """Return `qweight`, `qzeros`, `scales` and `g_idx`."""
        assert moments is not None
        inputs, size = weights[0].shape[1], self._rounding.group_size or weights[0].shape[1]
        second, order = moments.second, None
        if self._has_order:
            order = second.diagonal().argsort(descending=True, stable=True)
            second = second[order][:, order]
        factor, is_dead = inverse_factor(second, self._damping)
        groups = torch.arange(inputs, dtype=torch.int32, device=factor.device) // size
        if order is not None:
            groups = groups[order.argsort()]
        found = []
        for weight in weights:
            own = weight if order is None else weight[:, order]
            rounded = compensated(own, factor, is_dead, self._rounding)
            found.append(self._tensors(rounded, order, groups.clone()))
        return found

    def _tensors(self, rounded: Codes, order: Tensor | None, groups: Tensor) -> dict[str, Tensor]:
        bits = self._rounding.bits
        codes = rounded.codes if order is None else rounded.codes[:, order.argsort()]
        zeros = rounded.zeros.T.to(torch.uint8)
        stored = (zeros - 1) & self._rounding.top
        return {
            "qweight": to_words(codes, bits).T.contiguous(),
            "qzeros": to_words(stored, bits),
            "scales": rounded.scales.T.to(torch.float16).contiguous(),
            "g_idx": groups,
        }


def inverse_factor(second: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the upper Cholesky factor of the inverse of the damped moments, and dead inputs.

    Inputs that are always zero are left out; where rounding errors make the moments indefinite,
    the damping is doubled until they are not. Two matrices of the moments' size are made at most.
    """
    is_dead = second.diagonal() == 0
    lower = _lower_factor(second, is_dead, damping)
    while lower is None:
        damping *= 2
        lower = _lower_factor(second, is_dead, damping)
    inverse = torch.cholesky_inverse(lower)
    del lower
    return torch.linalg.cholesky(inverse, upper=True), is_dead


def _lower_factor(second: Tensor, is_dead: Tensor, damping: float) -> Tensor | None:
    damped = second.clone()
    diagonal = damped.diagonal()
    diagonal[is_dead] = 1
    diagonal.add_(damping * diagonal.mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    return None if int(failed) else lower


def compensated(weight: Tensor, factor: Tensor, is_dead: Tensor, rounding: Rounding) -> Codes:
    """Round a weight [outputs, inputs] input after input; `factor` is `inverse_factor`'s.

    The weight is changed.
    """
    weight[:, is_dead] = 0
    outputs, inputs = weight.shape
    scales = weight.new_empty(outputs, inputs // (rounding.group_size or inputs))
    made = Codes(
        codes=torch.empty_like(weight, dtype=torch.uint8),
        scales=scales,
        zeros=torch.empty_like(scales),
    )
    for first in range(0, inputs, BLOCK):
        block = slice(first, min(first + BLOCK, inputs))
        errors = _round_block(weight, factor, block, rounding, made)
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return made


def _round_block(
    weight: Tensor, factor: Tensor, block: slice, rounding: Rounding, made: Codes
) -> Tensor:
    """Round some inputs; correct those of the block, and return what is left to correct with."""
    size = rounding.group_size or weight.shape[1]
    errors = weight.new_zeros(weight.shape[0], block.stop - block.start)
    for i in range(block.start, block.stop):
        group = i // size
        if i % size == 0:
            own = _corrected(weight[:, i : i + size], factor, errors, i, block)
            made.scales[:, group], made.zeros[:, group] = rounding.grid(own)
        column, scale, zero = weight[:, i], made.scales[:, group], made.zeros[:, group]
        code = rounding.codes(column[:, None], scale, zero)[:, 0]
        made.codes[:, i] = code.to(torch.uint8)
        error = (column - (code - zero) * scale) / factor[i, i]
        weight[:, i + 1 : block.stop] -= error[:, None] * factor[i, i + 1 : block.stop]
        errors[:, i - block.start] = error
    return errors


def _corrected(own: Tensor, factor: Tensor, errors: Tensor, first: int, block: slice) -> Tensor:
    """Return the weights of a group from input `first` on, what lies behind the block corrected."""
    late = slice(max(first, block.stop), first + own.shape[1])
    if late.start >= late.stop:
        return own
    found = own.clone()
    found[:, late.start - first :] -= errors @ factor[block, late]
    return found
