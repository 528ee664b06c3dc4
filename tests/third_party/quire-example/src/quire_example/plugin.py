"""What the package offers. Imports no torch: Quire imports a class only when it is chosen."""

from __future__ import annotations

from quire import hookimpl
from quire.interfaces.plugin import AttentionPlugin, ModelPlugin, PluginOption
from quire_example.config import ExampleConfig

QUIRE_API_VERSION = (1, 0)


def parse_tile(text: str) -> int:
    """Return a number of tokens. Raises: ValueError."""
    tile = int(text)
    if tile < 1:
        raise ValueError(f"{tile} tokens are no tile; allowed: whole numbers from 1")
    return tile


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer the model, for checkpoints whose config.json names its architecture."""
    return [
        ModelPlugin(
            name="example",
            load="quire_example.model:ExampleForCausalLM",
            architectures=("ExampleForCausalLM",),
            config_class=ExampleConfig,
            summary="attention and MLP side by side, each behind a learned gate",
        )
    ]


@hookimpl
def quire_attention_backends() -> list[AttentionPlugin]:
    """Offer the backend by name; without a priority, `auto` never picks it."""
    return [
        AttentionPlugin(
            name="example",
            load="quire_example.attention:TiledAttention",
            options={
                "tile": PluginOption(
                    meaning="keys that are looked at together", default=256, parse=parse_tile
                )
            },
            summary="walks the KV cache in tiles, with a running softmax",
        )
    ]
