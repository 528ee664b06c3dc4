"""Attention backend `sdpa`: PyTorch's scaled_dot_product_attention, the default on a CPU."""

from quire import hookimpl
from quire.interfaces.plugin import AttentionPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_attention_backends() -> list[AttentionPlugin]:
    """Offer `sdpa`."""
    return [
        AttentionPlugin(
            name="sdpa",
            load="quire_attention.sdpa.backend:SdpaAttention",
            priority={"cpu": 100, "cuda": 50},
            summary="PyTorch's fused attention over gathered blocks",
        )
    ]
