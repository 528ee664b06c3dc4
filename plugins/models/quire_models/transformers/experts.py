"""Experts of Transformers' classes: their function exchanged for Quire's products.

gates and ups one after another, SiLU, no biases     ->  Quire's layer of experts, or its op
biases, another gate, weights [inputs, outputs]      ->  products of pairs, the class's gate
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quire.interfaces.model import BuildContext
from quire.interfaces.quantization import ExpertsMethod, ExpertsSpec, ShardRule, WeightLayer
from quire.layers.experts import Experts
from quire_kernels import ops
from quire_models.transformers.config import Refusal

EXPERTS = "quire"
SERVED = "_quire_experts"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
# What a layer of Quire's calls the same weights.
STORED = {GATE_UP: "gate_up_weight", DOWN: "down_weight"}
_SILU = ("SiLU", "SiLUActivation")


def register() -> None:
    """Let Transformers know Quire's function for experts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, serve)


def serve(module: nn.Module, x: Tensor, expert_ids: Tensor, weights: Tensor, *_: Any) -> Tensor:
    """Serve as an experts' function of Transformers: `x` [num_tokens, hidden_size]."""
    served: Tensor = getattr(module, SERVED)(x, expert_ids, weights)
    return served


def are_experts(module: nn.Module) -> bool:
    """Answer whether a module asks Transformers' interface for the function of its experts."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def note_top_k(
    top_k: dict[str, int], name: str, x: Tensor, expert_ids: Tensor, _weights: Tensor
) -> Tensor:
    """Write down how many experts serve a token; for a class on `meta`."""
    top_k[name] = expert_ids.shape[-1]
    return x.new_empty(x.shape)


def bind(module: nn.Module, served: Any) -> None:
    """Let a module's experts' function call this; it is no child of the module."""
    object.__setattr__(module, SERVED, served)


class OwnGate(ExpertsMethod):
    """Keep the experts of a module in the model's dtype, under any quantization, for its gate."""

    def __init__(self, module: nn.Module) -> None:
        # In a tuple: the layer is a child of the module.
        self._module = (module,)

    def create_weights(self, layer: WeightLayer) -> None:
        """Register gates and ups, and the way back: [num_experts, outputs, inputs]."""
        spec = layer.spec
        for name, shape in (
            (STORED[GATE_UP], (2 * spec.intermediate_size, spec.hidden_size)),
            (STORED[DOWN], (spec.hidden_size, spec.intermediate_size)),
        ):
            dtype = getattr(torch, spec.dtype)
            weight = torch.empty(spec.num_experts, *shape, dtype=dtype, device=spec.device)
            layer.add_weight(name, weight, ShardRule(output_dim=1, input_dim=2))

    def apply_experts(
        self, layer: WeightLayer, x: Tensor, weights: Tensor, expert_ids: Tensor
    ) -> Tensor:
        """Return the weighted sums."""
        return serve_any(self._module[0], x, expert_ids, weights)


def exchange(net: Any, top_k: dict[str, int], build: BuildContext) -> None:
    """Let experts be served by Quire: as layers of its own where files have each of them apart.

    Raises: Refusal where the device, or a quantization, has no experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = {name: m for name, m in net.named_modules() if are_experts(m)}
    rules = get_model_conversion_mapping(net, add_legacy=False) if found else []
    for name, module in found.items():
        why_not = ops.why_no_experts(str(build.device))
        if why_not is not None:
            raise Refusal(f"has {name}, experts, which {build.device} has not: {why_not}.")
        is_odd = module.is_transposed or module.has_bias or not module.has_gate
        parts = None if is_odd else parts_in_files(rules, name)
        if parts is None:
            bind(module, partial(serve_plain if is_plain(module) else serve_any, module))
            continue
        layer = _layer(name, module, top_k[name], parts, build)
        for own in (GATE_UP, DOWN):
            del module._parameters[own]
        module.add_module("layer", layer)
        bind(module, partial(_serve_layer, layer))


def _layer(
    name: str, module: Any, top_k: int, parts: tuple[str, str, str], build: BuildContext
) -> nn.Module:
    num_experts, hidden, size = module.down_proj.shape
    if is_plain(module):
        return build.experts(name, num_experts, hidden, size, top_k=top_k, parts=parts)
    spec = ExpertsSpec(
        name=name,
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=size,
        dtype=str(build.dtype).removeprefix("torch."),
        device=str(build.device),
        top_k=top_k,
        parts=parts,
    )
    return Experts(spec, OwnGate(module))


def is_plain(module: Any) -> bool:
    """Answer whether experts are what `ops.experts` multiplies."""
    odd = (module.is_transposed, module.has_bias, getattr(module, "has_post_expert_norm", False))
    own_gate = getattr(type(module)._apply_gate, "__name__", "") != "_default_apply_gate"
    if any(odd) or own_gate or not (module.has_gate and module.is_concatenated):
        return False
    return type(getattr(module, "act_fn", None)).__name__ in _SILU


def parts_in_files(rules: list[Any], name: str) -> tuple[str, str, str] | None:
    """Return what files call gate, up and down of one expert; None: all lie in one tensor."""
    found: dict[str, list[str]] = {}
    for rule in rules:
        [target, *more] = rule.target_patterns
        operations = [type(one).__name__ for one in getattr(rule, "operations", ())]
        for own, wanted in (
            (GATE_UP, ["MergeModulelist", "Concatenate"]),
            (DOWN, ["MergeModulelist"]),
        ):
            full = f"{name}.{own}"
            if operations == wanted and not more and full.endswith(target.lstrip("^")):
                found[own] = [_part(source) for source in rule._original_source_patterns]
    gate_up, down = found.get(GATE_UP, []), found.get(DOWN, [])
    if len(gate_up) != 2 or len(down) != 1:
        return None
    return gate_up[0], gate_up[1], down[0]


def _part(pattern: str) -> str:
    return pattern.rpartition("*.")[2].removesuffix("$").removesuffix(".weight").replace("\\", "")


def _serve_layer(layer: nn.Module, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    made: Tensor = layer(x, weights, expert_ids.long())
    return made


def serve_plain(module: Any, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums of experts whose weights lie in the class's own tensors."""
    return ops.experts(x, module.gate_up_proj, module.down_proj, weights, expert_ids.long())


def serve_any(module: Any, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums of experts with biases, a gate of their own, or weights turned round."""
    first = GATE_UP if module.has_gate else "up_proj"
    made = _product(module, first, x, expert_ids, expert_ids.shape[-1])
    made = module._apply_gate(made) if module.has_gate else module.act_fn(made)
    made = _product(module, DOWN, made, expert_ids, 1)
    if getattr(module, "has_post_expert_norm", False):
        made = module.post_expert_norm(made)
    weighted = made.unflatten(0, expert_ids.shape) * weights.unsqueeze(-1)
    return weighted.sum(1).to(x.dtype)


def _product(module: Any, name: str, x: Tensor, expert_ids: Tensor, top_k: int) -> Tensor:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    layer = getattr(module, "layer", None)
    weight = getattr(module, name) if layer is None else layer.get_weight(STORED[name])
    return ops.expert_products(
        x,
        weight,
        expert_ids,
        top_k=top_k,
        bias=bias,
        is_transposed=module.is_transposed,
    )
