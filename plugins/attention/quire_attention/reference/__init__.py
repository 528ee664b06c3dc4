"""Attention backend `reference`: the plain oracle, on every device, never tuned."""

from quire import hookimpl
from quire.interfaces.plugin import AttentionPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_attention_backends() -> list[AttentionPlugin]:
    """Offer `reference`, the last choice of `auto` everywhere."""
    return [
        AttentionPlugin(
            name="reference",
            load="quire_attention.reference.backend:ReferenceAttention",
            priority={"cpu": 0, "cuda": 0},
            summary="plain PyTorch, one sequence after another: the oracle of the others",
        )
    ]
