"""Each hook brings its kind of descriptor into the registry."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from fake_distributions import Installed, attention, model, returning

from quire.errors import ConfigError, PluginError
from quire.hooks import hookspecs
from quire.hooks.kinds import KINDS
from quire.hooks.registry import load_plugins
from quire.interfaces.plugin import (
    CheckpointPlugin,
    Descriptor,
    GrammarPlugin,
    LogitsProcessorPlugin,
    QuantizationPlugin,
    ReasoningParserPlugin,
    SamplerPlugin,
    ToolCallParserPlugin,
)

LOAD = "nowhere:Nothing"


def offered(installed: Installed, kind: str, descriptor: Descriptor) -> Descriptor:
    """Install a plugin that offers the descriptor through its kind's hook; return what arrived."""
    installed.plugin("mine", **{KINDS[kind].hook: returning([descriptor])})
    return load_plugins().entry(kind, descriptor.name).descriptor


def test_quire_checkpoints_brings_a_folder_by_name(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "a_package_with_weights"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = CheckpointPlugin(name="tiny", load="a_package_with_weights:weights")
    assert offered(installed, "checkpoint", checkpoint) is checkpoint

    registry = load_plugins()

    assert registry.checkpoint("tiny") == package / "weights"
    with pytest.raises(ConfigError, match="unknown bundled checkpoint 'tin'; installed: tiny."):
        registry.checkpoint("tin")


@pytest.mark.parametrize("load", ["fake_distributions:nothing", "nowhere_at_all:weights"])
def test_quire_checkpoints_without_their_folder_are_the_plugins_error(
    installed: Installed, load: str
) -> None:
    offered(installed, "checkpoint", CheckpointPlugin(name="tiny", load=load))

    with pytest.raises(PluginError, match="plugin 'mine' of mine-package 1.0 .*'tiny'"):
        load_plugins().checkpoint("tiny")


def test_quire_models_brings_claims_of_architectures(installed: Installed) -> None:
    llama = model("llama", "LlamaForCausalLM", "MistralForCausalLM")
    assert offered(installed, "model", llama) is llama

    registry = load_plugins()

    assert registry.models_for("MistralForCausalLM") == [llama]
    assert registry.models_for("Unknown") == []
    assert registry.architectures() == ["LlamaForCausalLM", "MistralForCausalLM"]


def test_quire_quantization_methods_brings_claims_of_formats(installed: Installed) -> None:
    fp8 = QuantizationPlugin(name="fp8", load=LOAD, formats=["fp8"])
    assert offered(installed, "quantization", fp8) is fp8

    assert load_plugins().quantization_for("fp8") == [fp8]


def test_quire_attention_backends_brings_a_backend(installed: Installed) -> None:
    backend = attention("mine", priority={"cpu": 1})

    assert offered(installed, "attention", backend) is backend


def test_quire_samplers_brings_a_sampler(installed: Installed) -> None:
    sampler = SamplerPlugin(name="mine", load=LOAD)

    assert offered(installed, "sampler", sampler) is sampler


def test_quire_logits_processors_brings_a_processor(installed: Installed) -> None:
    processor = LogitsProcessorPlugin(name="mine", load=LOAD)

    assert offered(installed, "logits-processor", processor) is processor


def test_quire_reasoning_parsers_brings_a_parser(installed: Installed) -> None:
    parser = ReasoningParserPlugin(name="mine", load=LOAD)

    assert offered(installed, "reasoning-parser", parser) is parser


def test_quire_tool_call_parsers_brings_a_parser(installed: Installed) -> None:
    parser = ToolCallParserPlugin(name="mine", load=LOAD)

    assert offered(installed, "tool-call-parser", parser) is parser


def test_quire_grammar_engines_brings_an_engine(installed: Installed) -> None:
    engine = GrammarPlugin(name="mine", load=LOAD, priority=5)

    assert offered(installed, "grammar", engine) is engine


@pytest.mark.parametrize("hook", [kind.hook for kind in KINDS.values()])
def test_hook_specifications_take_nothing_and_say_what_they_return(hook: str) -> None:
    function: Any = getattr(hookspecs, hook)
    kind = next(kind for kind in KINDS.values() if kind.hook == hook)

    signature = inspect.signature(function)

    assert not signature.parameters
    assert signature.return_annotation == f"list[{kind.descriptor.__name__}]"
    assert inspect.getdoc(function).endswith(".")


def test_every_hook_specification_belongs_to_a_kind() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("quire_")]

    assert hooks == [kind.hook for kind in KINDS.values()]
