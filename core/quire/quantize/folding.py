"""Find what makes the inputs of a block's linears, so that factors can be moved between them.

A factor for each input is moved exactly where the inputs are multiplied by it and the weights that
they meet divided by it. Where a model allows that is not asked of it but tried, with powers of
two, which change no bit of a product: a norm's weight, or the rows of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor, nn

from quire.layers.linear import Linear
from quire.quantize.streaming import StreamedProduct

Run = Callable[[], Any]


@frozen
class Fold:
    """`consumers` are names of linears; their inputs follow a parameter, or a projection's rows.

    `producer` is the parameter's name in the block, or that of the linear with these `rows`.
    """

    producer: str
    rows: slice | None
    consumers: tuple[str, ...]


@define
class _Seen:
    """What one pass gave: the inputs of each linear, and the block's outputs."""

    inputs: dict[str, Tensor]
    outputs: list[Tensor]


def linears_of(block: nn.Module) -> dict[str, Linear]:
    """Return a block's linear layers by their names in it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, Linear)}


def find_folds(block: nn.Module, run: Run) -> list[Fold]:
    """Return what can be folded, in the order of the linears; `run` calls the block on a sample."""
    before = _watched(block, run)
    found: dict[tuple[str, ...], Fold] = {}
    for producer, rows, target in _candidates(block):
        factors = _factors(target.shape[0], target)
        changed = target.clone()
        target.mul_(factors if target.dim() == 1 else factors[:, None])
        try:
            consumers = _followers(before, _watched(block, run), factors)
            if consumers and _is_exact(block, run, before, consumers, factors):
                found.setdefault(consumers, Fold(producer, rows, consumers))
        finally:
            target.copy_(changed)
    order = list(linears_of(block))
    return sorted(found.values(), key=lambda fold: order.index(fold.consumers[0]))


def _candidates(block: nn.Module) -> Iterator[tuple[str, slice | None, Tensor]]:
    sizes = {linear.spec.in_features for linear in linears_of(block).values()}
    inside = {id(p) for linear in linears_of(block).values() for p in linear.parameters()}
    for name, parameter in block.named_parameters():
        if id(parameter) not in inside and parameter.dim() == 1 and parameter.shape[0] in sizes:
            yield name, None, parameter.data
    for name, linear in linears_of(block).items():
        if linear.bias is not None:
            continue  # a bias would be rounded once more
        first = 0
        for size in linear.spec.output_sizes:
            rows = slice(first, first + size)
            if size in sizes:
                yield name, rows, linear.get_weight("weight").data[rows]
            first += size


def _factors(size: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    halves = torch.randint(0, 2, (size,), generator=generator)
    return torch.where(halves > 0, 2.0, 0.5).to(device=like.device, dtype=like.dtype)


def _watched(block: nn.Module, run: Run) -> _Seen:
    methods = {name: linear.method for name, linear in linears_of(block).items()}
    for method in methods.values():
        assert isinstance(method, StreamedProduct)
        method.inputs = []
    outputs = run()
    inputs = {}
    for name, method in methods.items():
        assert isinstance(method, StreamedProduct)
        assert method.inputs is not None
        if method.inputs:
            inputs[name] = torch.cat(method.inputs)
        method.inputs = None
    return _Seen(inputs, [t for t in _flat(outputs) if isinstance(t, Tensor)])


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _followers(before: _Seen, after: _Seen, factors: Tensor) -> tuple[str, ...]:
    """Return the linears whose inputs were multiplied by the factors, bit for bit."""
    return tuple(
        name
        for name, x in before.inputs.items()
        if x.shape[1] == len(factors)
        and bool(x.any())
        and torch.equal(after.inputs[name], x * factors)
    )


def _is_exact(
    block: nn.Module, run: Run, before: _Seen, consumers: tuple[str, ...], factors: Tensor
) -> bool:
    """Answer whether dividing the consumers' weights brings back every bit of the outputs."""
    weights = [linears_of(block)[name].get_weight("weight").data for name in consumers]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.div_(factors)
    after = _watched(block, run)
    for weight, old in zip(weights, kept, strict=True):
        weight.copy_(old)
    pairs = zip(before.outputs, after.outputs, strict=True)
    return all(torch.equal(old, new) for old, new in pairs)
