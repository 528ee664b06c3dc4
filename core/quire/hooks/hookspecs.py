"""What a plugin may implement, in the order in which the engine asks.

A plugin is a module behind an entry point of the group `quire`. It sets `QUIRE_API_VERSION` to
the version of `quire.interfaces` that it was written for, and implements one or more of these
functions, marked with `quire.hookimpl`. All are called once, at the start of every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from quire.interfaces.plugin import (
        AttentionPlugin,
        CheckpointPlugin,
        GrammarPlugin,
        LogitsProcessorPlugin,
        ModelPlugin,
        QuantizationPlugin,
        ReasoningParserPlugin,
        SamplerPlugin,
        ToolCallParserPlugin,
    )

hookspec = pluggy.HookspecMarker("quire")
hookimpl = pluggy.HookimplMarker("quire")


@hookspec
def quire_checkpoints() -> list[CheckpointPlugin]:
    """Return the checkpoints that the package carries.

    Each can then be loaded by its name, as in `quire generate demo`, with no download.
    """
    raise NotImplementedError


@hookspec
def quire_models() -> list[ModelPlugin]:
    """Return the model implementations that the plugin offers.

    Each claims the architectures that it can build, as config.json spells them. When several
    plugins claim one, the highest priority is used, or the one named by
    `--model-implementation`.
    """
    raise NotImplementedError


@hookspec
def quire_quantization_methods() -> list[QuantizationPlugin]:
    """Return the quantization methods that the plugin offers.

    Each claims the values of `quantization_config.quant_method` that it can read, and says
    whether it can also quantize a full-precision checkpoint while it is loaded.
    """
    raise NotImplementedError


@hookspec
def quire_attention_backends() -> list[AttentionPlugin]:
    """Return the attention backends that the plugin offers.

    `--attention-backend NAME` asks for one of them. Under `auto` the one with the highest
    priority for the device is used among those that can serve the model.
    """
    raise NotImplementedError


@hookspec
def quire_samplers() -> list[SamplerPlugin]:
    """Return the samplers that the plugin offers.

    `--sampler NAME` asks for one of them. Under `auto` the one with the highest priority for the
    device is used among those that can run there.
    """
    raise NotImplementedError


@hookspec
def quire_logits_processors() -> list[LogitsProcessorPlugin]:
    """Return the logits processors that the plugin offers.

    None of them runs unless `--logits-processors NAME` asks for it; a request then reaches it
    through `SamplingParams.extra_args[NAME]`.
    """
    raise NotImplementedError


@hookspec
def quire_reasoning_parsers() -> list[ReasoningParserPlugin]:
    """Return the reasoning parsers that the plugin offers.

    None of them is used unless `--reasoning-parser NAME` asks for it.
    """
    raise NotImplementedError


@hookspec
def quire_tool_call_parsers() -> list[ToolCallParserPlugin]:
    """Return the tool-call parsers that the plugin offers.

    None of them is used unless `--tool-call-parser NAME` asks for it.
    """
    raise NotImplementedError


@hookspec
def quire_grammar_engines() -> list[GrammarPlugin]:
    """Return the grammar engines that the plugin offers.

    `--grammar-backend NAME` asks for one of them. Under `auto` the one with the highest priority
    is used among those that can be used here.
    """
    raise NotImplementedError
