"""Experts of packed weights: each projection is read as a linear layer, and all are stacked.

Shared by the methods of this package whose linear layers are `packed.PackedProduct`s; not a plugin.
On a CPU a chosen expert's projections are multiplied as a linear layer's are. On a GPU those of the
chosen experts, or of all where tokens are many, are made wide and multiplied as dense ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from quire.interfaces.quantization import (
    ExpertsMethod,
    ExpertsSpec,
    LinearSpec,
    QuantizationMethod,
    ShardRule,
    WeightLayer,
)
from quire_kernels import ops
from quire_kernels.mixtures import sum_over_experts
from quire_kernels.packed.experts import StackedWeight, widen
from quire_quant.packed import PackedProduct

KINDS = ("gate_up", "down")
# What a linear layer keeps of its inputs' order, and the inverse, which is kept on a GPU.
ORDER, COLUMNS = "input_order", "input_columns"


def linear_spec(spec: ExpertsSpec, kind: str, expert: int) -> LinearSpec:
    """Return one projection of an expert, gates and ups as one, as a linear layer."""
    hidden, size = spec.hidden_size, spec.intermediate_size
    gate_up = kind == "gate_up"
    parts = spec.parts[:2] if gate_up else spec.parts[2:]
    return LinearSpec(
        name=f"{spec.name}.{expert}.{'gate_up_proj' if gate_up else parts[0]}",
        parts=parts,
        in_features=hidden if gate_up else size,
        output_sizes=(size, size) if gate_up else (hidden,),
        bias=False,
        dtype=spec.dtype,
        device=spec.device,
    )


def why_not_experts(method: QuantizationMethod, spec: ExpertsSpec) -> str | None:
    """Return why a method, by its linear layers, cannot serve the experts, or None."""
    if reason := ops.why_no_experts(spec.device):
        return reason
    first: dict[str, Any] = {}
    for kind, expert in _projections(spec):
        own = linear_spec(spec, kind, expert)
        if reason := method.why_unsupported(own):
            return f"of expert {expert}, {' and '.join(own.parts)}: {reason}"
        product = method.method_for(own)
        if product is not None and not isinstance(product, PackedProduct):
            return "it rounds activations, for which it has no products with experts"
        form = None if product is None else {**vars(product), "kind": type(product).__name__}
        if form != first.setdefault(kind, form) or (form is None) != (first["gate_up"] is None):
            return (
                f"experts of a layer must be quantized alike, and {own.name!r} is not as expert 0 "
                f"is"
            )
    return None


def experts_method(method: QuantizationMethod, spec: ExpertsSpec) -> PackedExperts | None:
    """Return a method for the experts; None: they are left alone, or not served."""

    def product(kind: str, expert: int) -> PackedProduct | None:
        found = method.method_for(linear_spec(spec, kind, expert))
        return found if isinstance(found, PackedProduct) else None

    if product("gate_up", 0) is None:
        return None
    return PackedExperts(spec, product)


def _projections(spec: ExpertsSpec) -> Iterator[tuple[str, int]]:
    for expert in range(spec.num_experts):
        for kind in KINDS:
            yield kind, expert


class OneExpert:
    """One projection of an expert as its linear method sees its layer.

    `made` holds what the method adds once the checkpoint was read.
    """

    def __init__(self, layer: WeightLayer, spec: LinearSpec, kind: str, expert: int) -> None:
        self.layer, self.spec = layer, spec
        self.kind, self.expert = kind, expert
        self.made: dict[str, Tensor] = {}
        self.rules: dict[str, ShardRule] = {}
        self.num_orders = 0

    def add_weight(self, name: str, tensor: Tensor, rule: ShardRule) -> None:
        """Keep a weight until all experts have theirs."""
        self.made[name], self.rules[name] = tensor, rule

    def get_weight(self, name: str) -> Tensor:
        """Return the expert's part of a stacked weight, or what was just made."""
        if name in self.made:
            return self.made[name]
        found = self.layer.get_weight(f"{self.kind}_{name}")[self.expert]
        return found[: self.num_orders] if name == ORDER else found

    def drop_weight(self, name: str) -> None:
        """Forget what was made; stacked weights are dropped when all experts are done."""
        self.made.pop(name, None)


class PackedExperts(ExpertsMethod):
    """All experts of a mixture, each projection kept as `PackedProduct` keeps it."""

    def __init__(
        self, spec: ExpertsSpec, product: Callable[[str, int], PackedProduct | None]
    ) -> None:
        self.spec = spec
        self.products: dict[tuple[str, int], PackedProduct] = {}
        self.names: dict[str, list[str]] = {}
        for kind, expert in _projections(spec):
            found = product(kind, expert)
            assert found is not None, "experts are quantized alike"
            # Tiles are for products with one weight, here any of many is taken.
            found.may_tile = False
            self.products[kind, expert] = found

    def _of(self, layer: WeightLayer, kind: str, expert: int) -> OneExpert:
        return OneExpert(layer, linear_spec(self.spec, kind, expert), kind, expert)

    def create_weights(self, layer: WeightLayer) -> None:
        """Register the tensors of all experts, without memory until they are filled."""
        for kind in KINDS:
            for expert in range(self.spec.num_experts):
                one = self._of(layer, kind, expert)
                # Of those that are alike; each notes that it is no tied head.
                self.products[kind, expert].create_weights(one)
            sizes, self.names[kind] = one.spec.output_sizes, list(one.made)
            for name, tensor in one.made.items():
                shape = (self.spec.num_experts, *tensor.shape)
                stacked = torch.empty(shape, dtype=tensor.dtype, device="meta")
                layer.add_weight(f"{kind}_{name}", stacked, _stacked(one.rules[name], sizes))

    def loaded_bytes(self, layer: WeightLayer) -> int:
        """Return what the experts' projections hold once they are loaded."""
        total = 0
        for kind in KINDS:
            one, product = self._of(layer, kind, 0), self.products[kind, 0]
            found = product.loaded_bytes(one)
            if found is None:
                product.create_weights(one)
                found = sum(t.numel() * t.element_size() for t in one.made.values())
            total += self.spec.num_experts * found
        return total

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Make of drawn weights what could be loaded."""
        for (kind, expert), product in self.products.items():
            product.settle_drawn(self._of(layer, kind, expert))

    def finish_loading(self, layer: WeightLayer) -> None:
        """Repack expert by expert.

        Raises: CheckpointError naming a tensor, as the linear method does.
        """
        for kind in KINDS:
            stacked: dict[str, Tensor] = {}
            for expert in range(self.spec.num_experts):
                one = self._of(layer, kind, expert)
                self.products[kind, expert].finish_loading(one)
                self._stack(stacked, one)
            for name in self.names[kind]:
                layer.drop_weight(f"{kind}_{name}")
            for name, tensor in stacked.items():
                layer.add_weight(f"{kind}_{name}", tensor, ShardRule(output_dim=1))

    def _stack(self, stacked: dict[str, Tensor], one: OneExpert) -> None:
        """Put what one expert has beside that of the others."""
        num_experts, sizes = self.spec.num_experts, one.spec.output_sizes
        for name, tensor in one.made.items():
            is_order = name == ORDER
            if is_order:
                tensor = tensor.expand(len(sizes), -1)
            if is_order and tensor.is_cuda:
                name, tensor = COLUMNS, tensor.argsort(-1).to(tensor.dtype)
            if name not in stacked:
                stacked[name] = _empty_like(tensor, num_experts)
                if is_order:
                    plain = torch.arange(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
                    stacked[name][:] = plain
            stacked[name][one.expert] = tensor

    def apply_experts(
        self, layer: WeightLayer, x: Tensor, weights: Tensor, expert_ids: Tensor
    ) -> Tensor:
        """Return the weighted sums of the chosen experts."""
        num_experts = self.spec.num_experts
        if not x.is_cuda:
            one = self._expert_of(layer)
            return sum_over_experts(x, weights, expert_ids, num_experts, one)
        chosen = None
        if expert_ids.numel() < num_experts:
            chosen = expert_ids.flatten()
            expert_ids = torch.arange(len(chosen), device=x.device).view_as(expert_ids)
        gate_up, down = (widen(self._weight(layer, kind), chosen, x.dtype) for kind in KINDS)
        return ops.experts(x, gate_up, down, weights, expert_ids)

    def _expert_of(self, layer: WeightLayer) -> Callable[[Tensor, int], Tensor]:
        def multiply(rows: Tensor, kind: str, expert: int) -> Tensor:
            product, one = self.products[kind, expert], self._of(layer, kind, expert)
            one.num_orders = product.num_orders
            return product.apply(one, rows, None)

        def expert(rows: Tensor, number: int) -> Tensor:
            return multiply(ops.silu_mul(multiply(rows, "gate_up", number)), "down", number)

        return expert

    def _columns(self, layer: WeightLayer, kind: str) -> Tensor | None:
        if not any(self.products[kind, e].num_orders for e in range(self.spec.num_experts)):
            return None
        if torch.device(self.spec.device).type == "cuda":
            return layer.get_weight(f"{kind}_{COLUMNS}")
        return layer.get_weight(f"{kind}_{ORDER}").argsort(-1)

    def _weight(self, layer: WeightLayer, kind: str) -> StackedWeight:
        form = self.products[kind, 0].form
        return StackedWeight(
            values=layer.get_weight(f"{kind}_values"),
            scales=layer.get_weight(f"{kind}_scales"),
            zeros=layer.get_weight(f"{kind}_zeros"),
            columns=self._columns(layer, kind),
            bits=form.bits,
            group_size=form.group_size,
        )


def _empty_like(tensor: Tensor, count: int) -> Tensor:
    """Return memory for as many tensors, one after another, each with the strides of this one."""
    dense = torch.empty_like(tensor)  # what is no view of something larger
    return dense.new_empty_strided((count, *dense.shape), (dense.numel(), *dense.stride()))


def _stacked(rule: ShardRule, sizes: tuple[int, ...]) -> ShardRule:
    """Return the rule of all experts' weights, stacked; parts as they are kept."""
    assert rule.output_dim is not None, rule
    packed = rule.pack_factor if rule.packed_dim == rule.output_dim else 1
    kept = tuple(size // packed for size in rule.part_sizes or sizes)
    return evolve(
        rule,
        output_dim=rule.output_dim + 1,
        input_dim=None if rule.input_dim is None else rule.input_dim + 1,
        packed_dim=None if rule.packed_dim is None else rule.packed_dim + 1,
        part_sizes=kept if len(sizes) > 1 else None,
    )
