"""Fill a model with random weights, drawn where they lie: what `--load-format dummy` does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.execution.weights import finish_tied_heads
from quire.interfaces.model import Model
from quire.layers.weights import WeightStore

# Small enough that no dtype overflows in a deep model, and never zero: zeros would let a GPU
# save power and clock higher than it does with a real checkpoint.
STD = 0.02
# Formats without a kernel that draws are filled through a bfloat16 piece of so many elements.
PIECE_ELEMENTS = 1 << 24


def draw_weights(model: Model, *, seed: int) -> None:
    """Draw every parameter from a normal distribution, and let every layer repack.

    Weights of layers have mean 0, plain parameters, which are those of norms, mean 1. The same
    seed gives the same weights on the same kind of device.
    """
    device = next(p.device for p in model.parameters() if not p.is_meta)
    generator = torch.Generator(device).manual_seed(seed)
    for module in sorted(model.modules(), key=_size, reverse=True):
        is_layer = isinstance(module, WeightStore)
        if isinstance(module, WeightStore):
            module.allocate()
        for parameter in module.parameters(recurse=False):
            _draw(parameter.data, 0.0 if is_layer else 1.0, generator)
        if isinstance(module, WeightStore):
            # At once: a layer that keeps a repacked copy gives its plain weights back here.
            _finish(module)
    finish_tied_heads(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size(module: nn.Module) -> int:
    """Return the size of a module's own weights: the largest are repacked while others are not."""
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _finish(layer: WeightStore) -> None:
    if not getattr(layer, "is_tied", False):
        layer.method.settle_drawn(layer)
        layer.finish_loading()


def _draw(target: Tensor, mean: float, generator: torch.Generator) -> None:
    if not target.is_floating_point():
        target.random_(generator=generator)
    elif target.element_size() > 1:
        target.normal_(mean, STD, generator=generator)
    else:
        for piece in target.view(-1).split(PIECE_ELEMENTS):
            drawn = torch.empty(piece.shape, dtype=torch.bfloat16, device=target.device)
            piece.copy_(drawn.normal_(mean, STD, generator=generator))
