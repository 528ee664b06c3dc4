"""Attention backend `cuda`: our own CUDA C++, compiled for the GPU that there is."""

from quire import hookimpl
from quire.interfaces.plugin import AttentionPlugin
from quire_attention.cuda import library

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_attention_backends() -> list[AttentionPlugin]:
    """Offer `cuda`."""
    return [
        AttentionPlugin(
            name="cuda",
            load="quire_attention.cuda.backend:CudaAttention",
            priority={"cuda": 110},
            summary="CUDA C++: split-KV decode, wgmma prefill on Hopper, windows, soft caps, sinks",
            build="quire_attention.cuda.library:build",
            is_built=library.is_built,
            why_unusable=library.why_unusable,
        )
    ]
