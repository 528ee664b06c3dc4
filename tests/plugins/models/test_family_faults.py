"""Faults that are put into each family, which the model kit has to catch and to explain."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from attrs import evolve
from torch import nn

from quire.interfaces.model import Model
from quire.interfaces.plugin import ModelPlugin
from quire.interfaces.rope import RopeParameters
from quire.layers.attention import Attention
from quire.testing import check_model
from quire.testing.kit_report import PROFILES
from quire.testing.model_cases import ModelSubject
from quire_models import falcon, gemma, gpt2, llama, olmo2, phi3

FEW = evolve(PROFILES["quick"], seconds=60, examples=12, longest=16, least=4)
FAMILIES: dict[str, ModelPlugin] = {
    plugin.name: plugin
    for family in (falcon, gemma, gpt2, llama, olmo2, phi3)
    for plugin in family.quire_models()
    if plugin.name != "llama" and not plugin.name.startswith(("llama-", "mistral-"))
}
Break = Callable[[Model], Any]


def with_fault(model: type[Model], put: Break) -> type[Model]:
    """Return the model with something wrong in it once it is built, where it has that."""

    def build(self: Any, config: Any, build: Any) -> None:
        model.__init__(self, config, build)
        put(self)

    return type(f"Broken{model.__name__}", (model,), {"__init__": build})


def with_config(model: type[Model], change: Callable[[Any], Any]) -> type[Model]:
    """Return the model that reads its config wrongly."""

    def build(self: Any, config: Any, build: Any) -> None:
        model.__init__(self, change(config), build)

    return type(f"Broken{model.__name__}", (model,), {"__init__": build})


def other_base(config: Any) -> Any:
    """Give every rotation of a config another base."""
    names = [name for name in ("rope", "local_rope") if hasattr(config, name)]
    ropes: dict[str, RopeParameters] = {name: getattr(config, name) for name in names}
    return evolve(config, **{name: evolve(rope, rope_theta=77.0) for name, rope in ropes.items()})


def without_norm(name: str) -> Break:
    """Take the norms of a name out."""

    def put(model: Model) -> Any:
        found = [m for path, m in model.named_modules() if path.split(".")[-1] == name]
        for norm in found:
            norm.forward = lambda x: x
            norm.add = lambda x, residual: (x + residual, x + residual)
            norm.add_then = lambda linear, x, residual: (linear(x + residual), x + residual)
            norm.add_then_gated = lambda *_: None
        return found

    return put


def rolled(right: Callable[[Any], Any], x: Any) -> Any:
    """Return the two halves of what comes out right, the second first."""
    out = right(x)
    return out.roll(out.shape[-1] // 2, -1)


def swap_gate_and_up(model: Model) -> Any:
    """Let the gate be the second half."""
    found = [m.gate_up_proj for m in model.modules() if hasattr(m, "gate_up_proj")]
    for layer in found:
        layer.forward = partial(rolled, layer.forward)
    return found


def without_positions(model: Any) -> Any:
    """Leave out what is learned of positions."""
    embedding = model.transformer.wpe
    right = embedding.forward
    embedding.forward = lambda positions: 0 * right(positions)
    return embedding


def without_slopes(model: Any) -> Any:
    """Leave out what distance costs."""
    found = [m for m in model.modules() if isinstance(m, Attention)]
    for layer in found:
        layer.alibi_slopes = None if layer.alibi_slopes is None else 0 * layer.alibi_slopes
    return found


def in_rows(model: Any) -> Any:
    """Take all queries first, then all keys, whatever the file's order is."""
    for block in model.transformer.h:
        block.self_attention.num_kv_heads = 1
    return model


def scale_nothing(model: Model) -> Any:
    """Leave scores of attention as they are."""
    found = [m for m in model.modules() if isinstance(m, Attention)]
    for layer in found:
        layer.options = evolve(layer.options, scale=1.0)
    return found


def drop_layer(model: Model) -> Any:
    """Have a layer fewer than the file."""
    [layers] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    del layers[-1]
    return layers


def layer_unloaded(model: type[Model]) -> type[Model]:
    """Leave the last layer in the file."""
    found = with_fault(model, drop_layer)
    names = (*model.weight_names.ignored, r".*\.1\..*")
    found.weight_names = evolve(model.weight_names, ignored=names)
    return found


GATED = {"gemma2", "gemma3", "mistral", "olmo2", "phi3"}
ROTATED = {"falcon", "gemma2", "gemma3", "mistral", "olmo2", "phi3"}
NORMS = {
    "bloom": ("word_embeddings_layernorm",),
    "falcon": ("input_layernorm", "ln_f"),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
    "gemma3": ("post_feedforward_layernorm", "k_norm"),
    "gpt2": ("ln_1", "ln_2"),
    "mistral": ("post_attention_layernorm",),
    "olmo2": ("post_attention_layernorm", "q_norm"),
    "phi3": ("input_layernorm", "norm"),
}
FAULTS: list[tuple[str, str]] = [
    ("gpt2", "positions"),
    ("bloom", "slopes"),
    ("bloom", "heads of q, k and v"),
    *((family, "RoPE base") for family in sorted(ROTATED)),
    *((family, "gate and up") for family in sorted(GATED)),
    *((family, "scale") for family in FAMILIES),
    *((family, "layer unloaded") for family in FAMILIES),
    *((family, name) for family, names in NORMS.items() for name in names),
]
ANY = r"logit|may be anything"
# The real class scales within PyTorch's function.
UNTOLD = {("falcon", "scale")}
SAYS = {
    "post_feedforward_layernorm": "the norm behind the MLP is missing",
    "gate and up": "gate and up are swapped",
    "scale": "attention scores are not scaled",
    "layer unloaded": "is ignored, and the real class computes with it",
    "input_layernorm": "the norm before attention is missing|may be anything",
    "pre_feedforward_layernorm": "the norm before the MLP is missing",
    "ln_1": "the norm before attention is missing|may be anything",
    "ln_2": "the norm before the MLP is missing|may be anything",
    "ln_f": "the final norm is missing|may be anything",
    "positions": "positions are not added|may be anything",
    "norm": "the final norm is missing|may be anything",
}


def broken(model: type[Model], fault: str) -> type[Model]:
    if fault == "RoPE base":
        return with_config(model, other_base)
    if fault == "layer unloaded":
        return layer_unloaded(model)
    puts = {
        "gate and up": swap_gate_and_up,
        "scale": scale_nothing,
        "positions": without_positions,
        "slopes": without_slopes,
        "heads of q, k and v": in_rows,
    }
    return with_fault(model, puts.get(fault) or without_norm(fault))


# All of them with `--all`.
SOME = [
    pytest.param(*fault, marks=pytest.mark.slow) if number % 4 else fault
    for number, fault in enumerate(FAULTS)
]


@pytest.mark.parametrize(("family", "fault"), SOME)
def test_a_fault_of_a_family_is_caught(family: str, fault: str) -> None:
    plugin = FAMILIES[family]
    subject = ModelSubject(
        model=broken(plugin.load_class(), fault),
        config_class=plugin.config_class,
        architecture=plugin.architectures[0],
    )

    report = check_model(subject, profile=FEW)

    failed = [check for check in report.checks if check.outcome == "failed"]
    assert len(failed) == 1, "it passed"
    says = ANY if (family, fault) in UNTOLD else SAYS.get(fault, ANY)
    assert re.search(says, failed[0].detail), failed[0].detail
    assert "raises" not in failed[0].detail, failed[0].detail
