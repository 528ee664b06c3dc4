"""The kinds of plugins: which hook brings them, as which descriptor, and what asks for one."""

from __future__ import annotations

from attrs import frozen

from quire.interfaces.plugin import (
    AttentionPlugin,
    CheckpointPlugin,
    Descriptor,
    GrammarPlugin,
    LogitsProcessorPlugin,
    ModelPlugin,
    QuantizationPlugin,
    ReasoningParserPlugin,
    SamplerPlugin,
    ToolCallParserPlugin,
)


@frozen(kw_only=True)
class Kind:
    """One kind of plugin. `title` names it in a sentence, `option` asks for one by name."""

    name: str
    title: str
    hook: str
    descriptor: type[Descriptor]
    option: str


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="checkpoint",
            title="bundled checkpoint",
            hook="quire_checkpoints",
            descriptor=CheckpointPlugin,
            option="MODEL",
        ),
        Kind(
            name="model",
            title="model implementation",
            hook="quire_models",
            descriptor=ModelPlugin,
            option="--model-implementation",
        ),
        Kind(
            name="quantization",
            title="quantization method",
            hook="quire_quantization_methods",
            descriptor=QuantizationPlugin,
            option="--quantization",
        ),
        Kind(
            name="attention",
            title="attention backend",
            hook="quire_attention_backends",
            descriptor=AttentionPlugin,
            option="--attention-backend",
        ),
        Kind(
            name="sampler",
            title="sampler",
            hook="quire_samplers",
            descriptor=SamplerPlugin,
            option="--sampler",
        ),
        Kind(
            name="logits-processor",
            title="logits processor",
            hook="quire_logits_processors",
            descriptor=LogitsProcessorPlugin,
            option="--logits-processors",
        ),
        Kind(
            name="reasoning-parser",
            title="reasoning parser",
            hook="quire_reasoning_parsers",
            descriptor=ReasoningParserPlugin,
            option="--reasoning-parser",
        ),
        Kind(
            name="tool-call-parser",
            title="tool-call parser",
            hook="quire_tool_call_parsers",
            descriptor=ToolCallParserPlugin,
            option="--tool-call-parser",
        ),
        Kind(
            name="grammar",
            title="grammar engine",
            hook="quire_grammar_engines",
            descriptor=GrammarPlugin,
            option="--grammar-backend",
        ),
    )
}
