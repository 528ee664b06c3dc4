"""The norm of a decoder layer, and the passes that a layer beside it may take over."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from quire.interfaces.model import BuildContext
from quire_kernels import ops


class Norm(nn.Module):
    """RMSNorm, alone or after an addition."""

    def __init__(self, size: int, eps: float, build: BuildContext) -> None:
        super().__init__()
        self.weight = build.parameter(size)
        self.eps = eps
        self.batch_invariant = build.batch_invariant

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x` [num_tokens, size]."""
        return ops.rms_norm(x, self.weight, self.eps, batch_invariant=self.batch_invariant)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised sum and the sum, which may be made in x's memory."""
        return ops.add_rms_norm(
            x, residual, self.weight, self.eps, batch_invariant=self.batch_invariant
        )

    def add_then(self, linear: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output for the normalised sum, and the sum."""
        fused: tuple[Tensor, Tensor] | None
        fused = linear.after_norm((x, residual), (self.weight, self.eps))
        if fused is not None:
            return fused
        normed, total = self.add(x, residual)
        return linear(normed), total

    def add_then_gated(self, linear: Any, x: Tensor, residual: Tensor) -> Any:
        """Return silu of the layer's first part times its second, and the sum; None: not in one."""
        return linear.after_norm((x, residual), (self.weight, self.eps), gated=True)


class WideNorm(Norm):
    """RMSNorm whose weight, plus an offset, multiplies before the one rounding."""

    offset: ClassVar[float] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x` [..., size]."""
        return ops.wide_rms_norm(
            x, self.weight, self.eps, offset=self.offset, batch_invariant=self.batch_invariant
        )

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised sum and the sum, which may be made in x's memory."""
        return ops.add_wide_rms_norm(
            x,
            residual,
            self.weight,
            self.eps,
            offset=self.offset,
            batch_invariant=self.batch_invariant,
        )

    def add_then(self, linear: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output for the normalised sum, and the sum."""
        normed, total = self.add(x, residual)
        return linear(normed), total

    def add_then_gated(self, linear: Any, x: Tensor, residual: Tensor) -> None:
        """Return None: no layer has this norm in it."""


class OffsetNorm(WideNorm):
    """RMSNorm whose weights are offset by one."""

    offset = 1.0


class NoNorm(nn.Module):
    """What stands where a family has no norm before attention or MLP."""

    def __init__(self, build: BuildContext) -> None:
        super().__init__()
        self.batch_invariant = build.batch_invariant

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def add_then(self, linear: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output for the sum, and the sum, which is made in x's memory."""
        total = x.add_(residual)
        return linear(total), total

    def add_then_gated(self, linear: Any, x: Tensor, residual: Tensor) -> None:
        """Return None: it is not done in one."""


def after_silu_mul(linear: Any, gate_up: Tensor, *, batch_invariant: bool) -> Tensor:
    """Return the layer's output for silu of the first half of `gate_up` times the second."""
    fused: Tensor | None = linear.after_silu_mul(gate_up)
    if fused is not None:
        return fused
    out: Tensor = linear(ops.silu_mul(gate_up, batch_invariant=batch_invariant))
    return out
