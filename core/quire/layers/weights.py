"""A place for a layer's weights: what a `WeightMethod` sees and what the loader fills."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quire.errors import PluginError
from quire.interfaces.quantization import ShardRule, WeightMethod


class WeightStore(nn.Module):
    """A module whose weights a `WeightMethod` creates; `parts` may fill one weight in slices.

    `rules[name]` says how a weight is cut, `part_sizes` how the parts lie along its outputs.
    """

    def __init__(self, spec: Any, method: WeightMethod) -> None:
        super().__init__()
        self.spec = spec
        self.method = method
        self.rules: dict[str, ShardRule] = {}

    def add_weight(self, name: str, tensor: Tensor, rule: ShardRule) -> None:
        """Register a weight that the checkpoint fills."""
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.rules[name] = rule

    def get_weight(self, name: str) -> Tensor:
        """Return a registered weight. Raises: PluginError if there is none of that name."""
        found = self._parameters.get(name)
        if found is None:
            raise PluginError(f"layer {self.spec.name!r} has no weight {name!r}.")
        return found

    def drop_weight(self, name: str) -> None:
        """Forget a weight, for instance after it was repacked."""
        del self._parameters[name]
        del self.rules[name]

    def allocate(self) -> None:
        """Give memory to weights that were registered on `meta`."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            if parameter.is_meta:
                # `empty_like` of `meta` is written in Python, whose imports take 36 MiB and 0.2 s.
                found = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.spec.device)
                self.register_parameter(name, nn.Parameter(found, requires_grad=False))

    @property
    def unallocated_bytes(self) -> int:
        """Bytes of the weights that have no memory yet."""
        own = self.parameters(recurse=False)
        return sum(p.numel() * p.element_size() for p in own if p.is_meta)

    def finish_loading(self) -> None:
        """Let the method repack."""
        self.method.finish_loading(self)

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Sizes of the fused parts along the outputs; one part where nothing is fused."""
        return ()


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory; on a CPU it costs nothing until it is written."""
    return torch.empty(*shape, dtype=dtype, device=device)
