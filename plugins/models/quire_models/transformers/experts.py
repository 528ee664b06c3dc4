"""Experts of Transformers' classes: their function exchanged for Quire's products.

gates and ups one after another, SiLU, no biases     ->  Quire's layer of experts, or its op
biases, another gate, weights [inputs, outputs]      ->  products of pairs, the class's gate
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from quire.errors import ConfigError
from quire.interfaces.model import BuildContext
from quire_kernels import ops

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


def exchange(net: Any, top_k: dict[str, int], build: BuildContext) -> None:
    """Let experts be served by Quire: as layers of its own where files have each of them apart.

    Raises: ConfigError where the device, or a quantization, has no experts.
    """
    for name, module in list(net.named_modules()):
        if not are_experts(module):
            continue
        why_not = ops.why_no_experts(str(build.device))
        if why_not is not None:
            raise ConfigError(f"has {name}, experts, which {build.device} has not: {why_not}.")
        parts = None if module.is_transposed or module.has_bias else parts_in_files(net, name)
        serve_own = serve_plain if is_plain(module) else serve_any
        if parts is None:
            bind(module, partial(serve_own, module))
            continue
        num_experts, size, hidden = (module.down_proj.shape[i] for i in (0, 2, 1))
        layer = build.experts(name, num_experts, hidden, size, top_k=top_k[name], parts=parts)
        for own in (GATE_UP, DOWN):
            del module._parameters[own]
        module.add_module("layer", layer)
        if is_plain(module):
            bind(module, partial(_serve_layer, layer))
            continue
        for own in (GATE_UP, DOWN):
            if getattr(layer, STORED[own]).dtype != build.dtype:
                raise ConfigError(
                    f"has {name}, experts with a gate of their own, which no quantization packs"
                )
        bind(module, partial(serve_any, module))


def is_plain(module: Any) -> bool:
    """Answer whether experts are what `ops.experts` multiplies."""
    odd = (module.is_transposed, module.has_bias, getattr(module, "has_post_expert_norm", False))
    own_gate = getattr(type(module)._apply_gate, "__name__", "") != "_default_apply_gate"
    if any(odd) or own_gate or not (module.has_gate and module.is_concatenated):
        return False
    return type(getattr(module, "act_fn", None)).__name__ in _SILU


def parts_in_files(net: Any, name: str) -> tuple[str, str, str] | None:
    """Return what files call gate, up and down of one expert; None: all lie in one tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, list[str]] = {}
    for rule in get_model_conversion_mapping(net, add_legacy=False):
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
    weight = getattr(module, name) if layer is None else getattr(layer, STORED[name])
    return ops.expert_products(
        x,
        weight,
        expert_ids,
        top_k=top_k,
        bias=bias,
        is_transposed=module.is_transposed,
    )
