"""Walk through a model block by block, whatever it does between its blocks.

To reach a block, the model's own forward pass is run with the blocks before it replaced: the last
of them returns what it returned, the others zeros, and the block itself ends the pass with what
it was given. So nothing but the blocks is computed more than once, and only what enters or leaves
one of them is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from quire.errors import ConfigError
from quire.interfaces.batch import Batch
from quire.interfaces.model import Model
from quire.layers.linear import Linear


def find_blocks(model: Model) -> tuple[str, list[nn.Module]]:
    """Return the name and the members of the list of modules that has the most linears.

    Raises: ConfigError where a model has none.
    """

    def num_linears(blocks: nn.Module) -> int:
        return sum(isinstance(module, Linear) for module in blocks.modules())

    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    best = max(lists, key=lambda found: num_linears(found[1]), default=None)
    if best is None or not num_linears(best[1]):
        raise ConfigError(
            f"{type(model).__name__} has no nn.ModuleList with linear layers, so that it cannot "
            "be quantized block by block."
        )
    return best[0], list(best[1])


@frozen
class Call:
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Any:
        """Call the block on copies: it may work in the memory of what it is given."""
        args = mapped(self.args, Tensor.clone)
        return block(*args, **mapped(self.kwargs, Tensor.clone))


class _Reached(Exception):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with its tensors changed, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(one, change) for one in value)
    if type(value) is dict:
        return {key: mapped(one, change) for key, one in value.items()}
    return value


def call_of(model: Model, blocks: list[nn.Module], index: int, batch: Batch, previous: Any) -> Call:
    """Return what block `index` is called with; `previous` is what the block before it gave."""

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(Call(args, kwargs))

    stubs: list[Callable[..., Any]] = []
    for number in range(index):
        given = previous if number == index - 1 else mapped(previous, torch.zeros_like)
        stubs.append(lambda *_, _given=given, **__: _given)
    with _replaced(blocks, [*stubs, reached]):
        try:
            model(model.embed(batch.token_ids), batch)
        except _Reached as end:
            return end.call
    raise ConfigError(f"{type(model).__name__} does not call its block {index}.")


@contextmanager
def _replaced(blocks: list[nn.Module], stubs: list[Callable[..., Any]]) -> Iterator[None]:
    changed = blocks[: len(stubs)]
    for block, stub in zip(changed, stubs, strict=True):
        block.forward = stub
    try:
        yield
    finally:
        for block in changed:
            del block.forward
