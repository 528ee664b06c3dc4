"""Attention backend `triton`: one kernel for decodes, chunks and prompts, the default on a GPU."""

from importlib.util import find_spec

from quire import hookimpl
from quire.interfaces.plugin import AttentionPlugin

QUIRE_API_VERSION = (1, 0)


def why_unusable() -> str | None:
    """Answer whether Triton is installed, without importing it."""
    if find_spec("triton") is None:
        return "the package triton is not installed; `pip install triton` brings it"
    return None


@hookimpl
def quire_attention_backends() -> list[AttentionPlugin]:
    """Offer `triton`."""
    return [
        AttentionPlugin(
            name="triton",
            load="quire_attention.triton.backend:TritonAttention",
            priority={"cuda": 100},
            summary="Triton kernels: split-KV decode, chunked prefill, windows, soft caps, sinks",
            why_unusable=why_unusable,
        )
    ]
