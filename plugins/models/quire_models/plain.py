"""What families older than Llama share: LayerNorm, and an MLP without a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from quire.interfaces.model import BuildContext

_tanh_gelu = partial(functional.gelu, approximate="tanh")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": functional.relu,
}


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the deviation, times a weight, plus a bias.

    Source: Ba et al., "Layer normalization", 2016.
    """

    def __init__(self, size: int, eps: float, build: BuildContext) -> None:
        super().__init__()
        self.weight, self.bias = build.parameter(size), build.parameter(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x` [num_tokens, size]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class PlainMLP(nn.Module):
    """Project, activate and project back; `names` are those of the two projections."""

    def __init__(
        self,
        names: tuple[str, str],
        sizes: tuple[int, int],
        activation: str,
        build: BuildContext,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden, size = sizes
        self.up = build.linear(names[0], hidden, size, bias=bias)
        self.down = build.linear(names[1], size, hidden, bias=bias)
        self.activate = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return [num_tokens, hidden_size] for `x` of the same shape."""
        out: Tensor = self.down(self.activate(self.up(x)))
        return out
