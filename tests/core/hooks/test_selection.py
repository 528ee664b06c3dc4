"""How models, quantization methods, samplers and logits processors are chosen."""

from __future__ import annotations

from typing import Any

import pytest
from fake_classes import FakeProcessor, FakeSampler, add_class
from fake_distributions import Installed, model, returning

from quire.errors import ConfigError
from quire.hooks.registry import Registry, load_plugins
from quire.hooks.selection import (
    select_logits_processors,
    select_model,
    select_quantization,
    select_sampler,
)
from quire.interfaces.plugin import LogitsProcessorPlugin, QuantizationPlugin, SamplerPlugin

NOT_HERE = returning("it needs a GPU")


def registry_of(installed: Installed, **hooks: list[Any]) -> Registry:
    """Return a registry with what one plugin returns from its hooks."""
    named = {hook: returning(offers) for hook, offers in hooks.items()}
    installed.plugin("mine", "stranger", **named)
    return load_plugins()


def quantization(name: str, *formats: str, **values: Any) -> QuantizationPlugin:
    """Return a descriptor that claims the formats."""
    return QuantizationPlugin(name=name, load="nowhere:Nothing", formats=formats, **values)


def test_select_model_settles_a_claim_by_priority(installed: Installed) -> None:
    registry = registry_of(
        installed,
        quire_models=[
            model("generic", "LlamaForCausalLM", "QwenForCausalLM", priority=-10),
            model("llama", "LlamaForCausalLM", priority=10),
        ],
    )

    plugin, selection = select_model(registry, ["LlamaForCausalLM"])

    assert plugin.name == selection.used == "llama"
    assert selection.why == "claims LlamaForCausalLM with priority 10"
    assert [p.name for p in registry.models_for("LlamaForCausalLM")] == ["llama", "generic"]


def test_select_model_takes_the_first_architecture_that_somebody_claims(
    installed: Installed,
) -> None:
    registry = registry_of(installed, quire_models=[model("b", "B"), model("c", "C")])

    assert select_model(registry, ["A", "B", "C"])[0].name == "b"


def test_select_model_passes_over_an_unusable_claim_and_says_why(installed: Installed) -> None:
    registry = registry_of(
        installed,
        quire_models=[model("a", "A", priority=5, why_unusable=NOT_HERE), model("b", "A")],
    )

    plugin, selection = select_model(registry, ["A"])

    assert plugin.name == "b"
    assert selection.passed_over == [("a", "it needs a GPU.")]


def test_select_model_honours_the_requested_implementation(installed: Installed) -> None:
    registry = registry_of(
        installed, quire_models=[model("a", "A", priority=5), model("b", "A", priority=1)]
    )

    plugin, selection = select_model(registry, ["A"], "b")

    assert plugin.name == "b"
    assert (selection.requested, selection.why) == ("b", "asked for by name")


def test_select_model_says_what_is_registered_and_how_to_add_one(installed: Installed) -> None:
    registry = registry_of(
        installed, quire_models=[model("llama", "LlamaForCausalLM", "MistralForCausalLM")]
    )

    with pytest.raises(ConfigError) as caught:
        select_model(registry, ["LamaForCausalLM"])

    assert str(caught.value) == (
        "no installed plugin builds LamaForCausalLM. Nearest: LlamaForCausalLM, "
        "MistralForCausalLM. Install a plugin that claims it, or write one: "
        "docs/write-a-plugin.md shows how. Registered architectures, as `quire plugins "
        "--architectures` lists them: LlamaForCausalLM, MistralForCausalLM."
    )


@pytest.mark.parametrize(
    ("requested", "fact"),
    [
        ("c", "unknown model implementation 'c'; installed: a, b."),
        ("b", "--model-implementation b does not build A; it builds B."),
        ("a", "model implementation 'a' cannot be used here: it needs a GPU."),
    ],
)
def test_select_model_never_replaces_the_requested_implementation(
    installed: Installed, requested: str, fact: str
) -> None:
    registry = registry_of(
        installed,
        quire_models=[model("a", "A", why_unusable=NOT_HERE), model("b", "B")],
    )

    with pytest.raises(ConfigError) as caught:
        select_model(registry, ["A"], requested)

    assert str(caught.value).startswith(fact)


def test_select_quantization_of_a_plain_checkpoint_is_none(installed: Installed) -> None:
    registry = registry_of(installed, quire_quantization_methods=[quantization("none")])

    plugin, selection = select_quantization(registry, None, None)

    assert plugin.name == "none"
    assert (selection.requested, selection.why) == ("auto", "the checkpoint is not quantized")


def test_select_quantization_follows_the_checkpoint_and_priority(installed: Installed) -> None:
    registry = registry_of(
        installed,
        quire_quantization_methods=[
            quantization("none"),
            quantization("fp8", "fp8", "compressed-tensors"),
            quantization("fp8-fast", "fp8", priority=3, why_unusable=NOT_HERE),
        ],
    )

    plugin, selection = select_quantization(registry, None, "fp8")

    assert plugin.name == "fp8"
    assert selection.why == "reads 'fp8' with priority 0"
    assert selection.passed_over == [("fp8-fast", "it needs a GPU.")]


def test_select_quantization_works_on_the_fly_where_declared(installed: Installed) -> None:
    registry = registry_of(
        installed, quire_quantization_methods=[quantization("int8", on_the_fly=True)]
    )

    assert select_quantization(registry, "int8", None)[0].name == "int8"


@pytest.mark.parametrize(
    ("requested", "quant_method", "fact"),
    [
        (None, "gptqq", "no installed plugin reads a checkpoint with quant_method 'gptqq'. Did"),
        ("fp9", None, "unknown quantization method 'fp9'; installed: gptq, none."),
        ("gptq", None, "--quantization gptq needs a checkpoint that was quantized with it;"),
        ("gptq", "awq", "--quantization gptq does not read this checkpoint, which is quantized as"),
        ("none", "gptq", "--quantization none does not read this checkpoint, which is quantized"),
    ],
)
def test_select_quantization_refuses_what_does_not_fit(
    installed: Installed, requested: str | None, quant_method: str | None, fact: str
) -> None:
    registry = registry_of(
        installed, quire_quantization_methods=[quantization("none"), quantization("gptq", "gptq")]
    )

    with pytest.raises(ConfigError) as caught:
        select_quantization(registry, requested, quant_method)

    assert str(caught.value).startswith(fact)


def test_select_sampler_picks_the_highest_priority_that_runs_on_the_device(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = add_class(monkeypatch, FakeSampler, "it needs Triton")
    plain = add_class(monkeypatch, FakeSampler)
    registry = registry_of(
        installed,
        quire_samplers=[
            SamplerPlugin(name="fast", load=fast, priority={"cpu": 9}),
            SamplerPlugin(name="plain", load=plain, priority={"cpu": 1}),
        ],
    )

    plugin, found, selection = select_sampler(registry, "auto", "cpu")

    assert plugin.name == "plain"
    assert issubclass(found, FakeSampler)
    assert selection.passed_over == [("fast", "it needs Triton.")]


def test_select_sampler_never_replaces_the_requested_one(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = add_class(monkeypatch, FakeSampler, "it needs Triton")
    registry = registry_of(installed, quire_samplers=[SamplerPlugin(name="fast", load=load)])

    with pytest.raises(ConfigError, match="--sampler fast cannot be used: it needs Triton. Ask"):
        select_sampler(registry, "fast", "cpu")


def test_select_logits_processors_keeps_the_given_order(installed: Installed) -> None:
    names = ["b", "a"]
    registry = registry_of(
        installed,
        quire_logits_processors=[
            LogitsProcessorPlugin(name=name, load="fake_classes:FakeProcessor") for name in names
        ],
    )

    chosen = select_logits_processors(registry, names)

    assert [plugin.name for plugin, _ in chosen] == names
    assert all(found.__name__ == FakeProcessor.__name__ for _, found in chosen)


@pytest.mark.parametrize(
    ("names", "fact"),
    [
        (["a", "a"], "--logits-processors names 'a' twice; name it once."),
        (["c"], "unknown logits processor 'c'; installed: a."),
    ],
)
def test_select_logits_processors_refuses_unknown_and_repeated_names(
    installed: Installed, names: list[str], fact: str
) -> None:
    registry = registry_of(
        installed,
        quire_logits_processors=[
            LogitsProcessorPlugin(name="a", load="fake_classes:FakeProcessor")
        ],
    )

    with pytest.raises(ConfigError) as caught:
        select_logits_processors(registry, names)

    assert str(caught.value).startswith(fact)
